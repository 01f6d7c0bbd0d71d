"""`blt byteify`: a BLT whose global transformer has the blocks of a Llama or a Qwen."""

import logging
from pathlib import Path
from typing import Any

from bytelatent.commands.byteify_options import ByteifySettings
from bytelatent.commands.convert import write_with_bar
from bytelatent.errors import UserError
from bytelatent.patching import Calibration, PatchSettings
from bytelatent.terminal import print_line
from bytelatent.weights import Config, StoredModel, blt_around, byteify, check_target, find_byte_lm, open_pretrained

LOGGER = logging.getLogger(__name__)


def run(settings: ByteifySettings) -> None:
    """Write the BLT; the source's weights pass through in pieces, so that memory does not limit its size.

    Raises:
        UserError: there is no such model, its blocks are of another kind, or the patching settings are not whole.
        Interrupted: by Ctrl-C; nothing is written.
    """
    target = Path(settings.out)
    check_target(target, "native", settings.licence)
    patching, calibration, byte_lm = _patching(settings)
    source = open_pretrained(settings.source, revision=settings.revision)
    shape = blt_around(source, settings.local_dim, settings.encoder_layers, settings.decoder_layers, settings.hash_rows)
    LOGGER.info(source.in_a_line())
    for line in source.warnings:
        LOGGER.warning(line)
    if source.chat_template is not None:
        LOGGER.warning("the source's chat template is left out: it is made for the source's tokens")
    config = Config(model=shape, context=settings.context, patching=patching, calibration=calibration)
    made = byteify(source, config, byte_lm, settings.seed)
    LOGGER.info(made.in_a_line())
    write_with_bar(made, target, "native", settings.licence)
    print_line(str(target))


def _patching(settings: ByteifySettings) -> tuple[PatchSettings, Calibration | None, StoredModel | None]:
    """The patching settings, what calibration measured with them, and the entropy model."""
    own: dict[str, Any] = {"threshold": settings.threshold, "patch_size": settings.patch_size}
    given = {name: value for name, value in own.items() if value is not None}
    if settings.entropy_model is None:
        if settings.patching == "entropy":
            raise UserError("entropy_model: patching 'entropy' needs a byte LM; name one: --entropy-model FOLDER")
        return PatchSettings.parse({"mode": settings.patching or "space", **given}, "--patching"), None, None
    if settings.patching not in (None, "entropy"):
        raise UserError(f"entropy_model: patching '{settings.patching}' reads no entropies; leave one of both out")
    byte_lm, _ = find_byte_lm(settings.entropy_model, setting="entropy_model")
    config = open_pretrained(settings.entropy_model, weights=False).config
    if config.patching is not None and config.patching.needs_entropies:
        patching = PatchSettings.parse({**config.patching.plain(), **given}, "--threshold")
        return patching, config.calibration if patching == config.patching else None, byte_lm
    if settings.threshold is None:
        raise UserError(
            f"threshold: '{settings.entropy_model}' states none; find one, and give it as --threshold: "
            f"blt calibrate TEXT --model {settings.entropy_model}"
        )
    return PatchSettings.parse({"mode": "entropy", **given}, "--threshold"), None, byte_lm
