"""Models from wherever they come."""

from pathlib import Path

from pydantic import ValidationError

from bytelatent.errors import UserError
from bytelatent.interop import meta, native
from bytelatent.interop.native import Config, Pretrained
from bytelatent.model import ByteLM

PUBLISHED_CONTEXT = 8192


def load(source: str | Path, byte_lm: str | Path | None = None) -> Pretrained:
    """A model from a run of ours, a folder in our format, or one in Meta's hub format.

    Args:
        byte_lm: where the byte LM is, if it does not stand inside `source`.

    Raises:
        UserError: there is no model, or it is not whole.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"model: '{source}' is no folder; name a run, such as runs/demo, or a downloaded model")
    if native.is_run(folder):
        found = native.load_run(folder)
    elif native.is_native(folder):
        found = native.load(folder)
    elif meta.is_meta(folder):
        try:
            found = _load_meta(folder)
        except KeyError as error:
            raise UserError(f"'{folder}': its JSON files lack the key {error}; fetch them again") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = "".join(f"{part}: " for part in first["loc"])
            raise UserError(
                f"'{folder}': its config.json is not consistent: {place}{first['msg'].removeprefix('Value error, ')}"
            ) from None
    else:
        raise UserError(f"model: '{source}' holds no model: neither settings.yaml nor a config.json that we know")
    if byte_lm is not None:
        found.byte_lm = load_byte_lm(byte_lm)
    return found


def load_byte_lm(source: str | Path) -> ByteLM:
    """A byte LM, or the byte LM of a BLT."""
    return load_byte_lm_and_context(source)[0]


def load_byte_lm_and_context(source: str | Path) -> tuple[ByteLM, int]:
    """A byte LM, or that of a BLT, and how many ids it is to see at once.

    Raises:
        UserError: there is none.
    """
    found = load(source)
    if isinstance(found.model, ByteLM):
        return found.model, found.config.context
    if found.byte_lm is not None:
        return found.byte_lm, found.config.context
    raise UserError(f"byte_lm: '{source}' holds a BLT without a byte LM; name the byte LM's own run or folder")


def _load_meta(folder: Path) -> Pretrained:
    source = f"{folder} (Meta's hub format)"
    if meta.is_byte_lm(folder):
        model = meta.load_byte_lm(folder)
        return Pretrained(model, Config(model=model.settings, context=PUBLISHED_CONTEXT), None, source)
    model, patching = meta.load_blt(folder)
    config = Config(model=model.settings, context=PUBLISHED_CONTEXT, patching=patching)
    return Pretrained(model, config, None, source)
