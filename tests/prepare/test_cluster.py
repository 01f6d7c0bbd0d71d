"""The SLURM executor against commands that do at once what SLURM does later."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bytelatent.errors import UserError
from bytelatent.prepare import PrepareSettings, prepare
from tests.prepare.folders import made_here, outputs, rows

# Runs every job of the array, and says its id as SLURM does.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
open("{log}", "a").write(" ".join(sys.argv[1:-1]) + "\\n")
last = int(re.search(r"#SBATCH --array=0-(\\d+)", script).group(1))
for task in range(last + 1):
    environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", RUN_OFFSET="0")
    subprocess.run(["bash", sys.argv[-1]], env=environment, check=True, capture_output=True)
print("Submitted batch job", 100 + len(open("{log}").readlines()))
"""
LAST_ARGUMENTS = '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")

    def install(name: str, script: str) -> None:
        (place / name).write_text(script)
        (place / name).chmod(0o755)

    install("srun", LAST_ARGUMENTS)
    install("scontrol", "#!/bin/bash\necho here\n")
    install("squeue", "#!/bin/bash\n")
    return install


def test_a_chain_of_jobs_makes_the_same_files(tmp_path: Path, slurm: Callable[[str, str], None]) -> None:
    log = tmp_path / "submitted"
    slurm("sbatch", SBATCH.format(python=sys.executable, log=log))
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(b"".join(rows(300)))
    settings = PrepareSettings(source=[str(source)], out=out, executor="slurm", partition="cpu", chunks=3)
    prepare(settings)
    assert outputs(out) == outputs(made_here(tmp_path / "here", source, chunks=3))
    submitted = log.read_text().splitlines()  # after each of the four, datatrove has a job add up its statistics
    waits_for = [line.partition("--dependency=")[2] for line in submitted[::2]]
    assert waits_for == ["", "afterok:101", "afterok:103", "afterok:105"]
    prepare(settings)  # finished: nothing is submitted
    assert log.read_text().splitlines() == submitted


def test_work_in_the_queue_is_not_submitted_again(tmp_path: Path, slurm: Callable[[str, str], None]) -> None:
    slurm("sbatch", f"#!/bin/bash\necho x >> {tmp_path}/calls\necho Submitted batch job 7\n")
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(rows(300)))
    settings = PrepareSettings(source=[str(source)], out=tmp_path / "out", executor="slurm", partition="cpu")
    prepare(settings)
    assert (tmp_path / "calls").read_text().count("x") == 8
    slurm("squeue", "#!/bin/bash\necho 7 PENDING\n")
    prepare(settings)
    assert (tmp_path / "calls").read_text().count("x") == 8
    slurm("squeue", "#!/bin/bash\n")  # failed and gone: try again
    prepare(settings)
    assert (tmp_path / "calls").read_text().count("x") == 16


def test_what_slurm_needs(tmp_path: Path, slurm: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(rows(3)))
    slurm("sbatch", "#!/bin/bash\nexit 1\n")
    for partition, match in ((None, "--partition"), ("cpu", "SLURM did not take")):
        settings = PrepareSettings(source=[str(source)], out=tmp_path / "out", executor="slurm", partition=partition)
        with pytest.raises(UserError, match=match):
            prepare(settings)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no 'sbatch'"):
        prepare(PrepareSettings(source=[str(source)], out=tmp_path / "out", executor="slurm", partition="cpu"))
