"""The demo: from text to bits per byte in minutes, without a download or a GPU."""

from bytelatent.commands.demo.demo import run_demo

__all__ = ["run_demo"]
