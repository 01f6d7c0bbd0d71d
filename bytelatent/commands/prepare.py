"""`blt prepare`: shuffle text and cut it into files for training."""

from bytelatent.prepare import PrepareSettings, prepare


def run(settings: PrepareSettings) -> None:
    prepare(settings)
