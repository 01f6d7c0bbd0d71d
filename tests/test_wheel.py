"""What is installed works alone: a wheel in an empty environment, and a clone's editable install beside the clone."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = ["apps", "bytelatent", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]
PACKAGES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
TINY = ["steps=2", "data.context=64", "data.batch_bytes=128", "validation.max_bytes=500", "device=cpu"]


def finished(*command: object, cwd: Path, **more: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "", **more}
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in a folder of the package's name, as `git clone` makes it."""
    clone = tmp_path / "parent" / "bytelatent"
    for name in BUILT_FROM:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        clone.mkdir(parents=True, exist_ok=True)
        copy(source, clone / name)
    return clone


def built(clone: Path, hook: str) -> Path:
    """The wheel that a hook of the build backend makes."""
    out = clone.parents[1] / hook
    out.mkdir()
    code = f"import sys, setuptools.build_meta as backend; backend.{hook}(sys.argv[1])"
    finished(sys.executable, "-c", code, out, cwd=clone)
    (wheel,) = out.glob("*.whl")
    return wheel


def environment_with(wheel: Path, place: Path) -> Path:
    """A new environment with the wheel; other packages are those of this one."""
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    finished(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("".join(f"{path}\n" for path in PACKAGES))
    return place / "bin"


def test_a_wheel_works_alone(clone: Path, tmp_path: Path) -> None:
    programs = environment_with(built(clone, "build_wheel"), tmp_path / "env")
    shutil.rmtree(clone)
    here = tmp_path / "here"
    here.mkdir()
    code = "import bytelatent; print(bytelatent.__file__)\n"
    code += "from bytelatent.serving.page import FOLDER; print((FOLDER / 'index.html').is_file())"
    where, has_page = finished(programs / "python", "-c", code, cwd=here).splitlines()
    assert Path(where).is_relative_to(tmp_path / "env")
    assert has_page == "True"
    assert json.loads(finished(programs / "blt", "patch", "some text", "--rule", "space", "--json", cwd=here))["space"]
    assert json.loads(finished(programs / "blt", "patch", "some text", "--json", cwd=here))["entropy"]  # by `tiny`
    assert finished(programs / "blt", "train", "config=debug", *TINY, cwd=here) == "runs/train\n"
    text = finished(programs / "blt", "generate", "def ", "-m", "runs/train", "-n", 4, cwd=here)
    assert text.startswith("def ")
    listed = finished(programs / "blt", "configs", cwd=here).splitlines()
    assert [line.split()[0] for line in listed] == sorted(
        path.stem for path in (ROOT / "apps" / "bytelatent" / "configs").glob("*.yaml")
    )


def test_an_editable_install_is_found_beside_the_clone(clone: Path, tmp_path: Path) -> None:
    programs = environment_with(built(clone, "build_editable"), tmp_path / "env")
    code = "import bytelatent; print(bytelatent.__file__); from bytelatent.config import Settings"
    for folder in (clone.parent, clone, tmp_path):
        where = finished(programs / "python", "-c", code, cwd=folder)
        assert where.strip() == str(clone / "bytelatent" / "__init__.py")
    assert finished(programs / "blt", "configs", "byte_lm", cwd=clone.parent).startswith("# The byte LM")
