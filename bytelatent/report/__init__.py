"""Patches and curves for people to look at: in the terminal, and as one self-contained HTML file."""

from bytelatent.report.page import Report, write_patches_page, write_report
from bytelatent.report.terminal import patched_text
from bytelatent.report.threshold import write_threshold_figure

__all__ = ["Report", "patched_text", "write_patches_page", "write_report", "write_threshold_figure"]
