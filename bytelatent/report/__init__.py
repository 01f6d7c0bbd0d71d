"""Patches, curves and runs for people to look at: in the terminal, as figures, and as one self-contained HTML file."""

from bytelatent.report.page import Report, write_patches_page, write_report
from bytelatent.report.runs import compare_runs
from bytelatent.report.runs_figure import write_runs_figure
from bytelatent.report.terminal import patched_text
from bytelatent.report.threshold import write_threshold_figure

__all__ = [
    "Report",
    "compare_runs",
    "patched_text",
    "write_patches_page",
    "write_report",
    "write_runs_figure",
    "write_threshold_figure",
]
