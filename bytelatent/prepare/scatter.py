"""The first pass: read a run of units, and write their lines as sorted runs."""

from collections.abc import Callable

import numpy as np

from bytelatent.prepare.disk import writing
from bytelatent.prepare.order import PlaceKeys, TextKeys, split_keys
from bytelatent.prepare.rows import Corrupt, RowReader, Rows
from bytelatent.prepare.runs import MAX_LINE_BYTES, RunWriter
from bytelatent.prepare.work import Work
from bytelatent.text import ReadOptions


def scatter(work: Work, task: int, report: Callable[[int], None]) -> None:
    """Do one task of the first pass, unless it is done.

    Args:
        report: told the bytes read.

    Raises:
        UserError: the input cannot be read, there are too many bad rows, or the disk is full.
    """
    plan = work.plan
    files = work.task_files(task)
    if files.marker() is not None:
        return
    text_keys = TextKeys(plan.request["seed"]) if plan.request["dedup"] else None
    corrupt = Corrupt(plan.request["max_bad_rows"])
    max_line = min(plan.run_bytes // 2, MAX_LINE_BYTES)
    options = ReadOptions(plan.request["text_key"], stored=False, max_row_bytes=plan.request["max_row_bytes"])
    reader = RowReader(plan.files, options, text_keys, corrupt, max_line, report)
    with writing(work.out):
        runs = RunWriter(files, plan.bits, plan.run_bytes, with_low=text_keys is not None)
        try:
            for number in range(*plan.tasks[task]):
                place_keys = PlaceKeys(plan.request["seed"], number)
                for rows in reader.read(plan.units[number]):
                    runs.add(rows, *_keys(rows, place_keys))
            runs.finish(corrupt.plain())
        finally:
            runs.close()


def _keys(rows: Rows, place_keys: PlaceKeys) -> tuple[np.ndarray, np.ndarray | None]:
    if rows.keys is not None:
        return split_keys(rows.keys)
    return place_keys.draw(len(rows.kept)), None
