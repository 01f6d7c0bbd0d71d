"""The published commands, as processes, in the order in which a user comes to them.

They run where `apps/` is, as in a clone, on the debug job's own text.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bytelatent import __version__
from tests import processes

ROOT = Path(__file__).parents[1]
DEBUG = "config=apps/bytelatent/configs/debug.yaml"
SMALL = ["steps=2", "data.context=64", "data.batch_bytes=128", "validation.max_bytes=500", "device=cpu"]
HELD_OUT = "def held(out):\n    return out\n" * 20


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return processes.ended([sys.executable, "-m", *map(str, command)], environment, cwd)


def printed(*command: object, cwd: Path) -> str:
    ended = run(*command, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of a clone that the commands name, after the debug job."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "apps", clone / "apps")
    (clone / "held_out.txt").write_text(HELD_OUT)
    assert printed("bytelatent.train", DEBUG, *SMALL, cwd=clone) == "runs/train\n"
    return clone


def test_train_wrote_a_run(clone: Path) -> None:
    rows = [json.loads(line) for line in (clone / "runs" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert 0 < rows[-1]["validation_bits_per_byte"] < 10


def test_torchrun(clone: Path) -> None:
    """In two processes: each takes seconds to start, and eight are no different to the code. They are new ones."""
    command = ("torch.distributed.run", "--nproc-per-node", 2, "-m", "bytelatent.train", DEBUG, "run=runs/two", *SMALL)
    assert printed(*command, cwd=clone) == "runs/two\n"
    checkpoint = clone / "runs" / "two" / "checkpoints" / "step-00000002"
    assert json.loads((checkpoint / "complete.json").read_text())
    assert len(list((checkpoint / "ranks").iterdir())) == 2


def test_stool(clone: Path) -> None:
    command = ("bytelatent.stool", "script=bytelatent.train", DEBUG, "nodes=1", "partition=gpu", "dry_run=true")
    folder = clone / "runs" / "debug"  # beside the run that is there already
    assert printed(*command, cwd=clone) == f"sbatch {folder}/submit.slurm\n"
    assert f"config={folder}/config.yaml" in (folder / "submit.slurm").read_text()
    shown = printed("bytelatent.train", f"config={folder}/config.yaml", "--print-config", cwd=folder)
    assert f"run: {folder} " in shown
    assert "minutes: 0.5 " in shown


def test_eval_is_blt_eval(clone: Path) -> None:
    given = ("held_out.txt", "--model", "runs/train", "--max-bytes", 300, "--json")
    measured = [
        json.loads(printed(*module, *given, cwd=clone)) for module in (["bytelatent.eval"], ["bytelatent", "eval"])
    ]
    assert all(result.pop("seconds") > 0 for result in measured)
    assert measured[0] == measured[1]
    assert measured[0]["num_bytes"] == 300


def test_generate_is_blt_generate(clone: Path) -> None:
    given = ("model=runs/train", "prompt=def ", "max_new_bytes=4", "sampling.temperature=0")
    text = printed("bytelatent.generate", *given, cwd=clone)
    assert text.startswith("def ")
    assert text == printed(
        *("bytelatent", "generate", "def ", "-m", "runs/train", "-n", 4, "--temperature", 0), cwd=clone
    )


def test_the_package_is_the_command(tmp_path: Path) -> None:
    assert printed("bytelatent", "--version", cwd=tmp_path) == f"bytelatent {__version__}\n"
    assert printed("bytelatent", "configs", "debug", cwd=tmp_path) == (
        ROOT / "apps" / "bytelatent" / "configs" / "debug.yaml"
    ).read_text(encoding="utf-8")
    listed = printed("bytelatent", "configs", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in listed] == sorted(
        path.stem for path in (ROOT / "apps" / "bytelatent" / "configs").glob("*.yaml")
    )
    assert all(len(line.split()) > 4 for line in listed)


def test_every_key_of_the_debug_job_has_a_comment() -> None:
    lines = (ROOT / "apps" / "bytelatent" / "configs" / "debug.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if line and not line.startswith("#")]
    assert len(keys) > 20
    groups = {"model:", "patching:", "data:", "optimizer:", "validation:", "checkpoint:", "parallel:", "encoder:"}
    assert [line for line in keys if "  # " not in line and line.strip() not in groups] == []
