"""`blt configs`: the configurations that come with the package."""

from bytelatent.commands.settings import ConfigsSettings
from bytelatent.configs import config_files, describe_config, find_config
from bytelatent.terminal import print_line


def run(settings: ConfigsSettings) -> None:
    if settings.name is not None:
        print_line(find_config(settings.name).read_text(encoding="utf-8").rstrip("\n"))
        return
    files = config_files()
    width = max(map(len, files))
    for known, path in files.items():
        print_line(f"{known:<{width}}  {describe_config(path)}")
