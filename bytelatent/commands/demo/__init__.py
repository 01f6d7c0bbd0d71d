"""The demo: from text to bits per byte in minutes, without a download or a GPU."""

from bytelatent.commands.demo.demo import run_demo
from bytelatent.commands.settings import DemoSettings

__all__ = ["run", "run_demo"]


def run(settings: DemoSettings) -> None:
    limits = settings.text_key, settings.max_bad_rows, settings.max_row_bytes
    run_demo(settings.minutes, settings.out, settings.text, settings.seed, *limits)
