"""Text from any model: one prompt as it comes, or many from a file.

python -m bytelatent.generate config=FILE.yaml prompt="The history of" sampling.temperature=0.7
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bytelatent import log, terminal
from bytelatent.command_line import from_command_line
from bytelatent.commands.chat_options import ChatSettings
from bytelatent.commands.options import GenerateSettings, default_model, model_named
from bytelatent.commands.rows import line_of, must_be_free, rows_at
from bytelatent.config import flat
from bytelatent.device import choose_device, is_out_of_memory, precision_of_weights
from bytelatent.errors import Interrupted, UserError, nearest
from bytelatent.files import partial_path
from bytelatent.inference import Continuation, Engine, Sampling, prompt_bytes
from bytelatent.inference.constraint import Constraint
from bytelatent.inference.quantize import check_quantize
from bytelatent.inference.settings import MAX_BATCH_SIZE, check_limits
from bytelatent.inference.step import engine_for
from bytelatent.signals import sigterm_interrupts
from bytelatent.text.documents import json_value
from bytelatent.text.formats import JSONL, TEXT, readable_kind
from bytelatent.text.streams import BYTE_ORDER_MARK, TextReader, readable
from bytelatent.weights import open_pretrained

USAGE = 'name what to continue: python -m bytelatent.generate model=runs/demo prompt="The history of"'
FREE = {"jsonl", "out", "batch_size", "device"}  # settings that may differ when a file is resumed
OF_A_ROW = {"prompt", "max_new_bytes", *Sampling.model_fields}
SAMPLES_AT_ONCE = 64  # of one prompt
GENERATED = {"text", "ended", "log_probabilities", "samples"}  # keys of what comes out

LOGGER = logging.getLogger(__name__)


def run(settings: GenerateSettings) -> None:
    generate(settings, sys.stdout.buffer)


def generate(settings: GenerateSettings, out: BinaryIO) -> None:
    """Continue a prompt, shown with what is added to it byte by byte, or the prompts of a file, row by row.

    Raises:
        UserError: the model or the prompts do not exist, a row is invalid, or `out` is not empty.
        Interrupted: Ctrl-C or SIGTERM; finished rows stay.
    """
    given = [name for name in ("prompt", "file", "jsonl") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise UserError(f"generate: {' and '.join(given)} are given; give one of them")
    settings = settings.model_copy(update={"model": model_named(settings) or default_model()})
    with sigterm_interrupts():
        constraint = _constraint(settings)
        if settings.jsonl is None:
            for name in ("out", "log_probabilities"):
                if getattr(settings, name):
                    raise UserError(f"{name}: it goes with jsonl; leave it out, or give the prompt as a row of a file")
            prompt, batch_size = _prompt(settings), min(settings.samples, SAMPLES_AT_ONCE)
            with _memory_named("samples", batch_size):
                _show(open_engine(settings, batch_size), prompt, settings, constraint, out)
            return
        if settings.out is not None:
            must_be_free(settings.out)
        rows = list(_rows(settings))
        _log_unknown_keys(rows, settings)
        if settings.out is None:
            _continue_rows(rows, settings, constraint, out)
            return
        with rows_at(settings.out, [row.given for row in rows], _made_with(settings), GENERATED) as (file, num_done):
            if num_done:
                LOGGER.info(f"{num_done:,} of {len(rows):,} rows are in '{partial_path(settings.out)}'; resuming")
            _continue_rows(rows[num_done:], settings, constraint, file)


def _made_with(settings: GenerateSettings) -> dict[str, Any]:
    """Settings that a file of rows must be resumed with."""
    return {key: value for key, value in flat(settings.shown()).items() if key not in FREE}


def open_engine(settings: GenerateSettings | ChatSettings, batch_size: int) -> Engine:
    """An engine for the model that the settings name.

    Raises:
        UserError: it does not exist, or cannot generate.
    """
    precision, place = precision_of_weights(settings.dtype), choose_device(settings.device)
    check_quantize(settings.quantize, place)
    found = open_pretrained(settings.model, settings.entropy_model).with_threshold(settings.threshold)
    patching = found.config.patching
    if patching is not None and patching.needs_entropies and found.byte_lm is None:
        raise UserError(f"generate: the patches of '{settings.model}' need a byte LM; name it: --entropy-model FOLDER")
    loaded = found.load(place, precision)
    # In float32, however it is stored: the same patches as those of `BLT`.
    byte_lm = loaded.byte_lm.to(torch.float32) if loaded.byte_lm is not None else None
    how = (batch_size, settings.quantize, loaded.vocabulary)
    return engine_for(loaded.model, patching, byte_lm, *how, kv_cache=settings.kv_cache)


def _constraint(settings: GenerateSettings) -> Constraint | None:
    """What every continuation must meet."""
    texts: dict[str, str | None] = {"regex": settings.regex}
    for name, path in (("schema", settings.json_schema), ("grammar", settings.grammar)):
        try:
            texts[name] = path if path is None else path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: '{path}' cannot be read: {getattr(error, 'strerror', error)}") from None
    return Constraint.of(**texts)


def _prompt(settings: GenerateSettings) -> bytes:
    if settings.prompt is not None:
        return prompt_bytes(settings.prompt)
    if settings.file is not None:
        return _prompt_in(str(settings.file))
    if sys.stdin.isatty():
        raise UserError("no prompt: give it as an argument, with --file or --jsonl, or pipe it in")
    return sys.stdin.buffer.read()


def _prompt_in(name: str) -> bytes:
    """The text of a file, decompressed; standard input takes any bytes as they are."""
    if Path(name).is_fifo():  # as `<(command)` of a shell
        with readable(name):
            return Path(name).read_bytes()
    found, compression = readable_kind(name)
    if not found.compressible:
        raise UserError(f"file: '{name}' is a {found.title} file; a prompt is text")
    with readable(name), TextReader(name, compression) as text:
        text.skip_byte_order_mark()
        prompt = text.read()
        if text.unread is not None:
            raise UserError(f"file: '{name}' {text.unread}")
    return prompt


def _show(
    engine: Engine, prompt: bytes, settings: GenerateSettings, constraint: Constraint | None, out: BinaryIO
) -> None:
    """The prompt and what comes after it, as it comes; several samples one after another, each once it is whole."""
    how = (settings.sampling, settings.max_new_bytes, settings.samples)
    asked = engine.submit(prompt, *how, constraint=constraint)
    began = time.perf_counter()
    if len(asked) == 1:
        _write(out, prompt)
        try:
            while asked[0].ended is None:
                engine.advance()
                _write(out, asked[0].new_text().encode())
        except KeyboardInterrupt:
            _write(out, b"\n")
            raise Interrupted from None
        _write(out, b"\n")
    else:
        engine.run()
        for number, continuation in enumerate(asked):
            _write(out, f"--- {number + 1} ---\n".encode() + prompt + continuation.text.encode() + b"\n")
    for continuation in asked:
        if continuation.failure is not None:
            raise continuation.failure
    num_ids = sum(len(continuation.ids) for continuation in asked)
    if log.shows_bars():
        rate, unit = num_ids / (time.perf_counter() - began), engine.vocabulary.unit
        log.console.print(f"{num_ids:,} {unit}, {rate:,.0f} {unit}/s", style="dim", highlight=False)


@dataclass(frozen=True)
class Row:
    """A prompt of a file, and how it is continued.

    Attributes:
        given: all that its line holds.
    """

    given: dict[str, Any]
    sampling: Sampling
    max_new_bytes: int


def _rows(settings: GenerateSettings) -> Iterator[Row]:
    """The rows, all of them checked before a model is read."""
    assert settings.jsonl is not None
    if settings.jsonl == "-":
        yield from _parsed(sys.stdin.buffer, "standard input", settings)
        return
    name = settings.jsonl
    found, compression = readable_kind(name)
    if found not in (JSONL, TEXT):
        raise UserError(f"jsonl: '{name}' is not JSONL; write each prompt as an object on a line of its own")
    with readable(name), TextReader(name, compression) as file:
        yield from _parsed(file, name, settings)
        if file.unread is not None:
            raise UserError(f"jsonl: '{name}' {file.unread}")


def _parsed(lines: IO[bytes], name: str, settings: GenerateSettings) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json_value(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line)
        except ValueError as error:
            raise UserError(f"{name}: line {number} is no JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'{name}: line {number} has no text under "prompt"; write {{"prompt": "..."}}')
        count = row.get("max_new_bytes", settings.max_new_bytes)
        try:
            prompt_bytes(row["prompt"])
            check_limits(max_new_bytes=count)
        except UserError as error:
            raise UserError(f"{name}: line {number}: {error}") from None
        for key in row.keys() - OF_A_ROW:
            if (meant := key.lower().replace("-", "_")) in OF_A_ROW:
                raise UserError(f"{name}: line {number}: '{key}' is no setting; write '{meant}'")
        own = {key: row[key] for key in Sampling.model_fields if key in row}
        sampling = Sampling.parse({**settings.sampling.model_dump(), **own}, where=f"{name}: line {number}")
        yield Row(row, sampling, count)


def _log_unknown_keys(rows: list[Row], settings: GenerateSettings) -> None:
    """Say once which keys of the rows look like a setting and are none, and which are written over."""
    written = GENERATED - {"samples"} if settings.samples == 1 else {"samples"}
    if not settings.log_probabilities:
        written -= {"log_probabilities"}
    for key in sorted({key for row in rows for key in row.given} - OF_A_ROW):
        if key in written:
            LOGGER.info(f"'{settings.jsonl}' has '{key}' of its own, which the rows that come out do not keep")
        elif key in GenerateSettings.model_fields or key in GenerateSettings.old_names:
            LOGGER.info(f"'{settings.jsonl}' has '{key}', which is no setting of a row and passes through")
        elif hint := nearest(key, sorted(OF_A_ROW), cutoff=0.75):  # also other programs' max_new_tokens
            LOGGER.info(f"'{settings.jsonl}' has '{key}', which is no setting and passes through{hint}")


def _continue_rows(rows: list[Row], settings: GenerateSettings, constraint: Constraint | None, out: BinaryIO) -> None:
    """Write each row with its continuation as soon as it and all before it are done."""
    if not rows:
        return
    batch_size = min(settings.batch_size, len(rows) * settings.samples, MAX_BATCH_SIZE)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    bar = Progress(*columns, console=log.console, transient=True, disable=not log.shows_bars())
    asked: list[list[Continuation]] = []
    with _memory_named("batch_size", batch_size), bar:
        engine = open_engine(settings, batch_size)
        task, began, written, num_ids = bar.add_task("", total=len(rows), rate=""), time.perf_counter(), 0, 0
        while written < len(rows):
            while len(asked) < len(rows) and engine.num_waiting < batch_size:  # all of them could be more than fit
                row = rows[len(asked)]
                prompt = row.given["prompt"]
                how = (row.sampling, row.max_new_bytes, settings.samples)
                asked.append(engine.submit(prompt, *how, constraint=constraint))
            if not all(continuation.ended for continuation in asked[written]):
                num_ids += len(engine.advance())
                bar.update(task, rate=f"{num_ids / (time.perf_counter() - began):,.0f} {engine.vocabulary.unit}/s")
                continue
            line = {**rows[written].given, **_generated(asked[written], settings)}
            asked[written] = []
            _write(out, line_of(line))
            written += 1
            bar.advance(task)


@contextmanager
def _memory_named(name: str, number: int) -> Iterator[None]:
    """Let an error of too little memory name the setting to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if number == 1:
            raise UserError("prompt: memory does not hold it beside the model; give a shorter one") from None
        way_out = f"lower --{name.replace('_', '-')}"
        raise UserError(f"{name}: memory does not hold {number:,} sequences at once; {way_out}") from None


def _generated(continuations: list[Continuation], settings: GenerateSettings) -> dict[str, Any]:
    found: list[dict[str, Any]] = [{"text": each.text, "ended": each.ended} for each in continuations]
    if settings.log_probabilities:
        for about, continuation in zip(found, continuations, strict=True):
            about["log_probabilities"] = [round(value, 5) for value in continuation.log_probabilities]
    return found[0] if settings.samples == 1 else {"samples": found}


def _write(out: BinaryIO, data: bytes) -> None:
    """Write bytes as they are; to a terminal, where they would be obeyed, as text that can only be read."""
    if out.isatty():
        data = terminal.safe(data.decode("utf-8", "replace")).encode()
    try:
        rest = memoryview(data)
        while rest:  # a disk that fills up takes a part first
            rest = rest[out.write(rest) :]
        out.flush()
    except BrokenPipeError:
        raise  # nobody reads any more, which is no error
    except OSError as error:
        raise UserError(f"the output cannot be written: {error.strerror or error}") from None


def main(arguments: list[str]) -> None:
    """`config=FILE key=value ...`"""
    log.configure()
    settings = from_command_line(GenerateSettings, arguments, USAGE, literal="prompt")
    generate(settings, sys.stdout.buffer)
