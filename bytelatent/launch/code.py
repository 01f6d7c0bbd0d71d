"""The code of a job: a copy, so that what is edited later changes nothing that waits in the queue."""

import importlib.util
import shutil
from pathlib import Path

from bytelatent.errors import UserError, nearest
from bytelatent.files import whole_folder


def package_of(script: str) -> Path:
    """The folder (or the file) of a module's top package, once it is certain that the module is there.

    Raises:
        UserError: it is not.
    """
    top, *inner = script.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise UserError(f"script: there is no module '{script}' here")
    package = Path(spec.origin)
    package = package.parent if package.name == "__init__.py" else package
    place = package.joinpath(*inner)
    if inner and not place.with_suffix(".py").is_file() and not (place / "__main__.py").is_file():
        known = [file.stem for file in place.parent.glob("*.py") if not file.stem.startswith("_")]
        raise UserError(
            f"script: there is no module '{script}'{nearest(inner[-1], known, script.removesuffix(inner[-1]))}"
        )
    return package


def copy_code(script: str, target: Path) -> None:
    """Copy the packages a job runs into the folder `target`: this one, and the script's where that is another one."""
    with whole_folder(target) as aside:
        for package in {package_of("bytelatent"), package_of(script)}:
            if package.is_dir():
                shutil.copytree(package, aside / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            else:
                shutil.copy2(package, aside / package.name)
