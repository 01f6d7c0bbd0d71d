"""The text of the batch script: what bash and sbatch read in it."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bytelatent.launch import LaunchSettings
from bytelatent.launch.slurm import batch_script

NAMES = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" '\"$`\\#!&;|"), min_size=1)


def script_of(dump_dir: str = "/runs/mine", here: str = "/here", code: str = "/code", **values: Any) -> str:
    settings = LaunchSettings.parse({"name": "mine", "ngpu": 8, "ncpu": 12, "requeue": True, **values})
    argument = f"config={dump_dir}/config.yaml"
    return batch_script(settings, Path(dump_dir), Path(here), "/env/bin/python", Path(code), argument)


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    words = [as_sbatch_reads(line) for line in lines]
    assert all(len(line) == 1 for line in words)
    return {name: value for [word] in words for name, _, value in [word.removeprefix("--").partition("=")]}


def as_sbatch_reads(line: str) -> list[str]:
    """The words of a line: quotes join, a backslash keeps the next character wherever it stands, # ends."""
    words, quote, characters = [""], "", iter(line)
    for character in characters:
        if character == "\\":
            words[-1] += next(characters)
        elif character == quote:
            quote = ""
        elif quote or character not in "\"'# ":
            words[-1] += character
        elif character == "#":
            break
        elif character == " ":
            words.append("")
        else:
            quote = character
    return words


def test_what_sbatch_is_asked_for() -> None:
    asked = directives(
        script_of(nodes=4, mem="0", time="2-00:00:00", partition="gpu", account="a", qos="q", constraint="h100&ib")
    )
    assert asked == {
        "job-name": "mine",
        "output": "/runs/mine/logs/%j.out",
        "open-mode": "append",
        "nodes": "4",
        "ntasks-per-node": "1",
        "cpus-per-task": "96",
        "gres": "gpu:8",
        "mem": "0",
        "time": "2-00:00:00",
        "partition": "gpu",
        "account": "a",
        "qos": "q",
        "constraint": "h100&ib",
        "signal": "B:USR1@120",
        "requeue": "",
    }
    asked = directives(script_of(launcher="srun", requeue=False, exclude="n[1-3],n7"))
    assert (asked["ntasks-per-node"], asked["cpus-per-task"], asked["exclude"]) == ("8", "12", "n[1-3],n7")
    assert "no-requeue" in asked
    assert "requeue" not in asked
    assert not {"mem", "time", "partition", "account", "qos", "constraint"} & asked.keys()
    asked = directives(script_of(ngpu=0, ncpu=None))
    assert not {"gres", "cpus-per-task"} & asked.keys()
    asked = directives(script_of(ngpu=0, nproc=4, ncpu=2))
    assert (asked["ntasks-per-node"], asked["cpus-per-task"]) == ("1", "8")
    assert "gres" not in asked


def test_a_short_job_is_reported_to_stop_half_way() -> None:
    assert directives(script_of(time="2"))["signal"] == "B:USR1@60"
    assert directives(script_of(time="10", grace=300))["signal"] == "B:USR1@300"
    assert directives(script_of(time="10", grace=400))["signal"] == "B:USR1@300"


def test_one_torchrun_a_node() -> None:
    one, four = script_of(), script_of(nodes=4)
    assert "--ntasks-per-node=1" in one
    assert "bytelatent.launch.torchrun --nproc-per-node=8 --standalone " in one
    assert '--nproc-per-node=8 --nnodes=4 --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"' in four
    assert "--standalone" not in four
    alone = script_of(nodes=4, launcher="srun")
    assert "srun --nodes=4 --ntasks-per-node=8 --cpus-per-task=12 " in alone
    assert "torchrun" not in alone
    assert "bytelatent.launch.torchrun --nproc-per-node=4 --standalone " in script_of(ngpu=0, nproc=4)
    assert "srun --nodes=1 --ntasks-per-node=4 " in script_of(ngpu=0, nproc=4, launcher="srun")


def test_only_what_goes_on_is_requeued() -> None:
    assert "scontrol requeue" in script_of()
    assert "scontrol requeue" not in script_of(requeue=False)


@given(name=NAMES, dump_dir=NAMES, here=NAMES, code=NAMES, account=NAMES)
def test_any_name_is_read_as_it_was_given(name: str, dump_dir: str, here: str, code: str, account: str) -> None:
    dump_dir, here, code = (f"/in {path.replace('/', '-')}" for path in (dump_dir, here, code))  # no path is "/."
    script = script_of(dump_dir, here, code, name=name, account=account)
    asked = directives(script)
    assert asked["job-name"] == name
    assert asked["account"] == account
    assert asked["output"] == f"{dump_dir}/logs/%j.out"
    commands = shlex.split("\n".join(line for line in script.splitlines() if not line.startswith("#")), comments=True)
    assert commands[:2] == ["cd", here]
    assert f"DUMP_DIR={dump_dir}" in commands
    assert f"PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}" in commands
    assert f"config={dump_dir}/config.yaml" in commands


def test_bash_reads_every_form() -> None:
    for values in ({}, {"nodes": 4}, {"launcher": "srun"}, {"ngpu": 0}, {"requeue": False}, {"ncpu": None}):
        script = script_of('/my runs/it\'s "1" $HOME', **values)
        ended = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert (ended.returncode, ended.stderr) == (0, "")
