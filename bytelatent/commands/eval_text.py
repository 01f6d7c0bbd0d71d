"""Bits per byte of models on text: `blt eval TEXT...`."""

import json
import logging
import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.device import Threads, choose_device
from bytelatent.errors import Interrupted, UserError
from bytelatent.evaluation import FoundModel, Measured, ReadSettings, Texts, compare, find_models, measure_texts
from bytelatent.files import growing_file, partial_path, write_whole_json
from bytelatent.model import TokenLMSettings
from bytelatent.model.flops import flops_per_byte
from bytelatent.progress import Progress
from bytelatent.report.text import UNKNOWN, aligned, number
from bytelatent.terminal import print_json, print_line
from bytelatent.text.documents import forget_logged, must_have_read
from bytelatent.text.formats import kind_of
from bytelatent.text.streams import size_of

LOGGER = logging.getLogger(__name__)

# Settings that a resumed evaluation must share with the one that was interrupted.
FIXED = {"text", "text_key", "by", "max_bytes", "max_row_bytes", "model", "entropy_model", "tokenizer", "context"}
FIXED |= {"overlap", "dtype", "threshold"}
UNITS = ("patch", "token")
ALL = "all"  # of the groups


def run(settings: EvaluateSettings) -> None:
    result = evaluate_models(settings)
    if settings.as_json:
        print_json(result)
    else:
        models = result.get("models", [result])
        for remark in result["remarks"]:
            print_line(remark)
        print_line(_line(models[0]) if len(models) == 1 and settings.by is None else _table(models, settings.markdown))
    must_have_read(result["unread"])


def evaluate_models(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate models on the same documents.

    Returns:
        The result of a single model, or `models`, those of several; with the number of `bad_rows`, of documents that
        were `left_out`, `remarks`, and the files that are `unread`, of which nothing could be read.

    Raises:
        UserError: a model or the text is not there, or there are too many bad rows.
        Interrupted: Ctrl-C.
    """
    forget_logged()
    found = found_models(settings)
    names = {"text_key", "by", "max_bytes", "max_bad_rows", "max_row_bytes"}
    texts = Texts(settings.text, **settings.model_dump(include=names), valid_only=any(m.reads_tokens for m in found))
    texts.check()
    measured = [Measured() for _ in found]
    about: list[dict[str, Any]] = []
    remarks: list[str] = []
    with stored_rows(settings, found, measured) as write:
        for at, (model, rows) in enumerate(zip(found, measured, strict=True)):
            extra, own = evaluate_one(model, rows, texts, at, write, measured[0] if at else None)
            about.append(extra)
            remarks += own
        result = _result(settings, found, measured, about)
        remarks += texts.remarks(next((model.name for model in found if model.reads_tokens), ""))
        result |= {"left_out": texts.num_left_out, "remarks": remarks}
        result |= {"bad_rows": texts.bad_rows.count, "unread": texts.bad_rows.unread}
        if settings.out is not None:
            write_whole_json(settings.out, result, indent=1)
    return result


def found_models(settings: EvaluateSettings) -> list[FoundModel]:
    """The models, as they read texts."""
    device = choose_device(settings.device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    how = ReadSettings(device, dtype, settings.context, settings.overlap, settings.batch_size, settings.tokenizer)
    how = replace(how, threshold=settings.threshold)
    return find_models(settings.model, settings.entropy_model, how)


def evaluate_one(
    found: FoundModel, rows: Measured, texts: Texts, at: int, write: BinaryIO | None, like: Measured | None
) -> tuple[dict[str, Any], list[str]]:
    """Measure a model, and say of it what does not depend on the group."""
    began, model = time.perf_counter(), found.load()
    since = began

    def on_row(row: dict[str, Any]) -> None:
        if write is not None:
            write.write(json.dumps({"model": at, **row}).encode() + b"\n")

    what = "measuring" if like is None and at == 0 else f"measuring {found.name}"
    total = _about_bytes([file for _, file in texts.files], texts.max_bytes)
    with Threads.of(model.device) as threads, Progress(what, total, about=True) as progress:

        def on_batch(num_bytes: int) -> None:
            nonlocal since
            before, since = since, time.perf_counter()
            threads.took(since - before)
            progress.advance(num_bytes)

        try:
            measure_texts(model, texts, rows, on_row, on_batch, like)
        except UserError:
            must_have_read(texts.bad_rows.unread)  # names a file, where the other reports that there was no text
            raise
    if not rows.nats:
        must_have_read(texts.bad_rows.unread)
        left = ": all of it is left out, since it is not valid UTF-8" if texts.num_left_out else ""
        raise UserError(f"eval: the text holds no bytes{left}")
    num_bytes, num_units = sum(rows.num_bytes), sum(rows.num_units)
    extra = {"model": found.name, "context": model.context, "overlap": model.overlap}
    for unit in UNITS:
        extra[f"mean_{unit}_bytes"] = num_bytes / num_units if model.unit == unit and num_units else None
    return extra | {"seconds": time.perf_counter() - began}, model.remarks


def _result(
    settings: EvaluateSettings, found: list[FoundModel], measured: list[Measured], about: list[dict[str, Any]]
) -> dict[str, Any]:
    def compared(models: list[Measured]) -> list[dict[str, Any]]:
        every = compare(models, settings.resamples, settings.seed)
        return [
            {**numbers, "flops_per_byte": flops_per_byte_of(model, numbers)}
            for model, numbers in zip(found, every, strict=True)
        ]

    every = compared(measured)
    results = [{**extra, **numbers} for extra, numbers in zip(about, every, strict=True)]
    if settings.by is not None:
        for result in results:
            result["groups"] = {}
        by_group = [each.by_group() for each in measured]
        for group in by_group[0]:
            own = compared([each[group] for each in by_group])
            for result, numbers in zip(results, own, strict=True):
                result["groups"][group] = numbers
    return results[0] if len(results) == 1 else {"models": results}


def flops_per_byte_of(found: FoundModel, numbers: dict[str, Any]) -> float | None:
    """Operations of a forward pass over a full context, also of the byte LM that finds patches; None where unknown."""
    if found.stored is None:
        return None
    config, byte_lm = found.stored.config, found.stored.byte_lm
    unit_bytes = numbers["num_bytes"] / numbers["num_units"] if numbers["num_units"] else 1.0
    context = int(found.context * (unit_bytes if isinstance(config.model, TokenLMSettings) else 1))
    flops = flops_per_byte(config.model, unit_bytes, context)
    if byte_lm is not None and config.patching is not None and config.patching.needs_entropies:
        flops += flops_per_byte(byte_lm.config.model, context=context)
    return flops


@contextmanager
def stored_rows(
    settings: EvaluateSettings, found: list[FoundModel], measured: list[Measured], fixed: Collection[str] = FIXED
) -> Iterator[BinaryIO | None]:
    """The file to which a row is written per document and model, after what an interrupted call left has been read.

    Raises:
        UserError: the files cannot be written, or are of other settings, models or texts.
        Interrupted: Ctrl-C; says how to resume.
    """
    out = settings.out
    if out is None:
        try:
            yield None
        except KeyboardInterrupt:
            raise Interrupted("nothing is kept; with --out FILE, the same command resumes") from None
        return
    if out.exists():
        raise UserError(f"out: '{out}' is there already; name another file, or move it away")
    header = {"settings": json.loads(settings.model_dump_json(include=set(fixed))), "models": [m.state for m in found]}
    path = out.with_name(f"{out.name}.rows.jsonl")
    if path.exists():
        raise UserError(f"out: '{path}' holds the rows of other results already; name another --out, or move it away")
    try:
        with growing_file(path) as file:
            part = partial_path(path)
            if part.stat().st_size == 0:
                file.write(json.dumps(header).encode() + b"\n")
            else:
                _read_rows(part, header, measured)
                done = sum(len(rows.nats) for rows in measured)
                LOGGER.info(f"{done:,} rows are in '{part}'; resuming")
            yield file
    except KeyboardInterrupt:
        raise Interrupted(f"what is measured is in '{partial_path(path)}', and the same command resumes") from None


def _read_rows(part: Path, header: dict[str, Any], measured: list[Measured]) -> None:
    with part.open("rb") as lines:
        try:
            before = json.loads(next(lines))
            for name, value in header["settings"].items():
                if before["settings"].get(name) != value:
                    other = before["settings"].get(name)
                    raise UserError(f"out: '{part}' was begun with {name}={other}, not {value}; name another file")
            for name, old, new in zip(header["settings"]["model"], before["models"], header["models"], strict=True):
                if old != new:
                    raise UserError(f"out: '{part}' was begun before the files of '{name}' changed; name another file")
            for line in lines:
                row = json.loads(line)
                if not math.isfinite(row["nats"]) or row["num_bytes"] < 1:
                    raise ValueError
                measured[row["model"]].add(row)
        except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"out: '{part}' is not what an evaluation writes; name another file") from None


def _line(result: dict[str, Any]) -> str:
    found = f"{result['bits_per_byte']:.4f} bits per byte on {result['num_bytes']:,} bytes"
    for unit in UNITS:
        if result[f"mean_{unit}_bytes"] is not None:
            found += f"  {result[f'mean_{unit}_bytes']:.2f} bytes per {unit}"
    return found if result["interval"] is None else f"{found}  (95 %: {shown_interval(result['interval'])})"


def _table(models: list[dict[str, Any]], markdown: bool) -> str:
    """A line for each group and model."""
    groups = list(models[0].get("groups", {}))
    header = ["group"] * bool(groups) + ["model", "bits per byte", "95 % interval"]
    header += ["difference", "95 % interval"] * (len(models) > 1) + ["documents", "bytes"]
    units = [unit for unit in UNITS if any(model[f"mean_{unit}_bytes"] is not None for model in models)]
    header += [f"bytes per {' or '.join(units)}"] * bool(units) + ["MFLOPs per byte"]
    rows = []
    for group in [*groups, None]:
        for model in models:
            of = model if group is None else model["groups"][group]
            row = [group or (ALL if ALL not in groups else f"({ALL})")] * bool(groups)
            row += [model["model"], number(of["bits_per_byte"], 4), shown_interval(of["interval"])]
            if len(models) > 1:
                is_first = model is models[0]
                row += [UNKNOWN if is_first else f"{of['difference']:+.4f}"]
                row += [UNKNOWN if is_first else shown_interval(of["difference_interval"], "+")]
            row += [f"{of['num_documents']:,}", f"{of['num_bytes']:,}"]
            row += [number(of["num_bytes"] / of["num_units"]) if of["num_units"] else UNKNOWN] * bool(units)
            rows.append([*row, UNKNOWN if of["flops_per_byte"] is None else number(of["flops_per_byte"] / 1e6)])
    return aligned(header, rows, 1 + bool(groups), markdown)


def shown_interval(interval: tuple[float, float] | None, sign: str = "") -> str:
    return UNKNOWN if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"


def _about_bytes(files: list[str], max_bytes: int | None) -> int | None:
    """About how much text there is to read, for the time left; None where a file's size is not known.

    Text is taken to be as large as the files that hold it, and compressed to a third.
    """
    size = 0
    try:
        for file in files:
            kind = kind_of(file)
            is_compressed = kind.compression is not None or (kind.format is not None and not kind.format.compressible)
            size += size_of(file) * (3 if is_compressed else 1)
    except (OSError, UserError):
        return max_bytes
    return size if max_bytes is None else min(size, max_bytes)
