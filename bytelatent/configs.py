"""The configurations that come with the package, found by name from anywhere.

They lie in `apps/bytelatent/configs/` of a clone, and in `bytelatent/configs/` of a wheel, where `setup.py` puts them.
"""

from pathlib import Path

from bytelatent.errors import UserError, nearest

_PACKAGE = Path(__file__).parent
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "apps" / "bytelatent" / "configs")


def config_files() -> dict[str, Path]:
    """The file of each configuration by its name."""
    folder = next((place for place in _PLACES if place.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder is not None else {}


def find_config(config: str) -> Path:
    """The file that `config=` names: a path, or else a name of the package's own.

    Raises:
        UserError: there is neither.
    """
    if not config:
        raise UserError("config: no file is named; as in config=apps/bytelatent/configs/byte_lm.yaml")
    path = Path(config)
    if path.is_file():
        return path
    files = config_files()
    if config in files:
        return files[config]
    hint = nearest(path.stem, list(files), cutoff=0.7)
    raise UserError(f"config: '{config}' does not exist{hint}; name a YAML file, or one that `blt configs` lists")


def describe_config(path: Path) -> str:
    """The comment at the head of a configuration, up to its first full stop."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# ").strip())
        if line.endswith("."):
            break
    return " ".join(lines)
