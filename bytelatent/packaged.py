"""The model that the package brings: a small BLT with its byte LM, for a first look. setup/train_tiny.py makes it."""

from pathlib import Path

TINY = "tiny"
FOLDER = Path(__file__).parent / TINY


def packaged_folder(name: str | Path) -> Path | None:
    """Where the model of this name is; None for any other name, or where a folder here has this one."""
    return FOLDER if str(name) == TINY and not Path(name).is_dir() else None
