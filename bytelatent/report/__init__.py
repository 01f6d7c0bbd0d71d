"""Patches, curves and runs for people: in the terminal, as figures, and as self-contained HTML pages."""

from bytelatent.report.drawing import figure_format
from bytelatent.report.entropy_figure import write_entropies_figure
from bytelatent.report.figures import (
    write_noise_figure,
    write_patches_figure,
    write_runs_figure,
    write_threshold_figure,
)
from bytelatent.report.page import RunReport, write_patches_page, write_report
from bytelatent.report.runs import compare_runs
from bytelatent.report.text import patched_text

__all__ = [
    "RunReport",
    "compare_runs",
    "figure_format",
    "patched_text",
    "write_entropies_figure",
    "write_noise_figure",
    "write_patches_figure",
    "write_patches_page",
    "write_report",
    "write_runs_figure",
    "write_threshold_figure",
]
