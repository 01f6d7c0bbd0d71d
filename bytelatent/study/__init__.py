"""Studies: models compared at equal training FLOPs, from a plan to result rows."""

from bytelatent.study.results import HeldOut, StudyRow, read_rows, write_row

__all__ = ["HeldOut", "StudyRow", "read_rows", "write_row"]
