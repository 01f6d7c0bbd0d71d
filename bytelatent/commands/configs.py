"""`blt configs`: the configurations that come with the package."""

from bytelatent.commands.options import ConfigsSettings
from bytelatent.config import config_files, find_config
from bytelatent.terminal import print_line


def run(settings: ConfigsSettings) -> None:
    if settings.name is not None:
        print_line(find_config(settings.name).read_text(encoding="utf-8").rstrip("\n"))
        return
    files = config_files()
    width = max(map(len, files))
    for name, path in files.items():
        # The comment at its head, up to the first full stop that ends a line.
        comment = path.read_text(encoding="utf-8").partition(".\n")[0].replace("\n# ", " ").removeprefix("# ")
        print_line(f"{name:<{width}}  {comment}.")
