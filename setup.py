"""The configurations of `apps/` go into wheels. All else about the package is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path("apps/bytelatent/configs")


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # else they are read where they lie
            target = Path(self.build_lib) / "bytelatent" / "configs"
            self.mkpath(str(target))
            for file in sorted(CONFIGS.glob("*.yaml")):
                self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
