"""A model behind HTTP: `blt serve`."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bytelatent import __version__
from bytelatent.commands import import_uncollected
from bytelatent.commands.options import default_model, model_named
from bytelatent.commands.serve_options import ServeSettings
from bytelatent.errors import UserError
from bytelatent.terminal import print_line

if TYPE_CHECKING:
    from bytelatent.serving.backend import Backend

LOGGER = logging.getLogger(__name__)
KEY_VARIABLE = "BLT_API_KEY"
LOOPBACK = ("127.", "::1", "localhost")
MIB = 2**20


def run(settings: ServeSettings) -> None:
    """Serve until a signal asks to stop.

    Raises:
        UserError: there is no such model, the address cannot be had, or a package is missing.
    """
    try:
        app, server, state = (import_uncollected(f"bytelatent.serving.{name}") for name in ("app", "server", "state"))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bytelatent"):
            raise
        raise UserError(f"serve needs the package {error.name}; run: pip install 'bytelatent[serve]'") from None
    settings = settings.model_copy(update={"model": model_named(settings) or default_model()})
    keys = api_keys(settings.api_key_file)
    shared = state.ServerState(settings.name or [settings.model], settings.limits, __version__)
    hosts = _hosts(settings)
    application = app.application(shared, keys, hosts, settings.allow_origin)
    listening = server.listening_socket(settings.host, settings.port)
    address = server.address_of(listening)
    LOGGER.info(f"loading '{settings.model}'")
    print_line(f"serving '{shared.names[0]}': open {address} in a browser; OpenAI clients take {address}/v1")
    if not keys and not settings.host.startswith(LOOPBACK):
        LOGGER.warning(f"anybody who reaches {settings.host} may use it: there is no API key (--api-key-file)")
    running = server.Server(application, shared, settings.drain_seconds)
    running.serve_until_stopped(listening, lambda: load_backend(settings))


def load_backend(settings: ServeSettings) -> "Backend":
    """The model with its scheduler; torch is imported here, once the address is known."""
    [blt, scheduler, backend, calibration] = [
        import_uncollected(f"bytelatent.{name}") for name in ("blt", "serving.scheduler", "serving.backend", "patching")
    ]
    model = blt.BLT.from_pretrained(
        settings.model,
        entropy_model=settings.entropy_model,
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        kv_cache=settings.kv_cache,
    )
    if settings.threshold is not None:
        if not model.patching.needs_entropies:
            raise UserError(f"threshold: '{settings.model}' has patches by {model.patching.in_words()}; leave it out")
        values = {**model.patching.plain(), "threshold": settings.threshold}
        model.patching = calibration.PatchSettings.parse(values, "--threshold")
    if model.chat_template is None:
        LOGGER.info(f"'{settings.model}' has no chat template; chats use the default one")
    batch_size, prefill_chunk = (64, 4096) if model.device.type == "cuda" else (16, 512)
    running = scheduler.Scheduler(
        model,
        batch_size=settings.batch_size or batch_size,
        max_waiting=settings.max_waiting,
        prefill_chunk=settings.prefill_chunk or prefill_chunk,
        prefix_cache_bytes=int(settings.prefix_cache_mb * MIB),
    )
    return backend.Backend(model, running)


def api_keys(path: Path | None) -> list[bytes]:
    """The keys of a file, or else of the environment; they are never shown.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    if path is None:
        key = os.environ.get(KEY_VARIABLE)
        if key is None:
            return []
        if not key.strip():
            raise UserError(f"{KEY_VARIABLE}: it is empty; set it to a key, or unset it")
        return [_checked_key(os.fsencode(key.strip()), KEY_VARIABLE)]
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"api_key_file: '{path}' cannot be read: {error.strerror or error}") from None
    keys = [
        _checked_key(line.strip(), f"api_key_file: line {number} of '{path}'")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.strip().startswith(b"#")
    ]
    if not keys:
        raise UserError(f"api_key_file: '{path}' holds no key; write one on a line of its own")
    return keys


def _checked_key(key: bytes, where: str) -> bytes:
    if not all(0x21 <= byte <= 0x7E for byte in key):
        raise UserError(f"{where}: a key is of ASCII letters, digits and signs, without spaces; write another one")
    return key


def _hosts(settings: ServeSettings) -> Sequence[str]:
    """The names by which the server may be called; none: any."""
    if not settings.host.startswith(LOOPBACK):
        return settings.allow_host
    from bytelatent.serving.gate import LOCAL_HOSTS

    return [*LOCAL_HOSTS, settings.host, *settings.allow_host]
