"""`blt runs`: compare training runs."""

from bytelatent.commands.options import RunsSettings
from bytelatent.log import Console
from bytelatent.report import compare_runs
from bytelatent.terminal import print_json


def run(settings: RunsSettings) -> None:
    comparison = compare_runs(settings.folders)
    if settings.as_json:
        print_json(comparison.plain())
    else:
        comparison.show(Console())
