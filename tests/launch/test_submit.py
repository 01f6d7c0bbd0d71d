"""A job's folder: what is written, what is submitted, what is refused."""

import errno
import io
import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from bytelatent.cli import app
from bytelatent.errors import UserError
from bytelatent.launch import package_of
from bytelatent.model import build_model
from bytelatent.weights import Config, save
from tests.launch.conftest import Cluster, launched
from tests.training.tiny_runs import blt_run, byte_lm_run, settings

NAME = 'it\'s "1" $HOME'


def configured(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return configured(tmp_path / "given.yaml", **{**byte_lm_run(Path("runs/of config"), Path("text.jsonl")), "seed": 3})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").touch()
    return tmp_path


def test_the_published_command(cluster: Cluster, here: Path, config: Path) -> None:
    line = launched("script=bytelatent.train", f"config={config}", "nodes=1", "partition=gpu")
    dump_dir = here / "runs" / "of config"
    assert line == f"job 7 submitted; tail -F '{dump_dir}/logs/7/0.out'; cancel: scancel 7"
    assert cluster.asked == [f"sbatch --parsable {dump_dir}/submit.slurm"]
    assert sorted(os.listdir(dump_dir)) == ["code", "config.yaml", "launch.yaml", "logs", "submit.slurm"]
    settings = yaml.safe_load((dump_dir / "config.yaml").read_text())
    assert settings == {**yaml.safe_load(config.read_text()), "run": str(dump_dir)}
    asked = yaml.safe_load((dump_dir / "launch.yaml").read_text())
    assert (asked["ngpu"], asked["ncpu"], asked["name"], asked["requeue"]) == (8, 8, "of config", True)
    assert asked["dump_dir"] == str(dump_dir)


def test_text_that_is_not_there(cluster: Cluster, here: Path, config: Path) -> None:
    """Found before anything is written or submitted; the job runs in the folder that it is launched from."""
    (here / "text.jsonl").unlink()
    with pytest.raises(UserError) as caught:
        launched(f"config={config}", "nodes=1")
    assert str(caught.value).startswith("data.train: 'text.jsonl' does not exist; ")
    assert str(caught.value).endswith(f" (the job looks for it from '{here}')")
    with pytest.raises(UserError, match=r"^data.train: '/absent/text' does not exist; [^(]*$"):
        launched(f"config={config}", "nodes=1", "--", "data.train=/absent/text")
    assert cluster.asked == []
    assert not (here / "runs").exists()
    launched(f"config={config}", "nodes=1", "--", "data.train=s3://bucket/text")  # for the job to find
    assert len(cluster.asked) == 1
    launched(f"config={config}", "dump_dir=other", "dry_run=true")


def test_a_byte_lm_that_is_not_there(cluster: Cluster, here: Path) -> None:
    values = blt_run(Path("runs/blt"), Path("text.jsonl"), Path("/absent/lm"))
    config = configured(here / "given.yaml", **values)
    with pytest.raises(
        UserError, match=r"^entropy_model: '/absent/lm' is not a folder; [^(]*\(blt demo makes runs/demo\)[^(]*$"
    ):
        launched(f"config={config}")
    with pytest.raises(
        UserError, match=rf"^entropy_model: 'runs/lm' is not a folder; .* \(the job looks for it from '{here}'\)$"
    ):
        launched(f"config={config}", "--", "entropy_model=runs/lm")
    assert cluster.asked == []
    assert not (here / "runs").exists()
    launched(f"config={config}", "dry_run=true")
    model = build_model(settings(values).model)
    (here / "lm").mkdir()
    save(here / "lm", model, Config(model=settings(values).model, context=64))
    with pytest.raises(UserError, match=r"^entropy_model: 'lm' holds a BLT without a byte LM; "):
        launched(f"config={config}", "dump_dir=other", "--", "entropy_model=lm")


@pytest.mark.parametrize(
    ("nodes", "arguments", "message"),
    [
        (2, ["parallel.tensor=2"], "parallel.tensor divides the global transformer, and a byte LM has none"),
        (3, ["parallel.data=hybrid", "parallel.replicas=7"], "parallel.replicas: 24 processes are no multiple of 7"),
        (1, ["cuda_graph=true"], "cuda_graph: it is for one process on CUDA, not for 8 processes"),
    ],
)
def test_what_so_many_processes_cannot_do(
    cluster: Cluster, here: Path, config: Path, nodes: int, arguments: list[str], message: str
) -> None:
    """The number follows from the nodes, and here from the GPUs that SLURM says they have."""
    for more in ([], ["dry_run=true"]):
        with pytest.raises(UserError, match=message):
            launched(f"config={config}", "partition=gpu", f"nodes={nodes}", *more, "--", *arguments)
    assert cluster.asked == []
    assert not (here / "runs").exists()


def test_processes_on_the_cpu_share_a_nodes_cores(cluster: Cluster, here: Path, config: Path) -> None:
    for nproc, ncpu in ((1, 64), (4, 16), (100, 1)):
        launched(f"config={config}", f"dump_dir={nproc}", "ngpu=0", f"nproc={nproc}")
        assert yaml.safe_load((here / str(nproc) / "launch.yaml").read_text())["ncpu"] == ncpu


def test_settings_of_the_script_stand_after_two_dashes(cluster: Cluster, here: Path, config: Path) -> None:
    launched(f"config={config}", f"dump_dir={NAME}", "ngpu=0", "--", "steps=9", "data.context=32", "optimizer.lr=1e-3")
    settings = yaml.safe_load((here / NAME / "config.yaml").read_text())
    assert (settings["steps"], settings["data"]["context"], settings["optimizer"]["lr"]) == (9, 32, 1e-3)
    assert settings["seed"] == 3
    assert settings["run"] == str(here / NAME)


def test_the_verb_writes_the_same(cluster: Cluster, here: Path, config: Path) -> None:
    arguments = ["--config", str(config), "--dump-dir", "by_a", "--ngpu", "2", "--time", "12:00:00", "--no-copy-code"]
    result = CliRunner().invoke(app, ["launch", *arguments, "steps=9"], catch_exceptions=False)
    assert result.stdout.startswith("job 7 submitted; ")
    launched(f"config={config}", "dump_dir=by_b", "ngpu=2", "time=12:00:00", "copy_code=false", "--", "steps=9")
    for name in ("launch.yaml", "config.yaml", "submit.slurm"):
        assert (here / "by_a" / name).read_text().replace("by_a", "by_b") == (here / "by_b" / name).read_text()
    assert not (here / "by_a" / "code").exists()


def test_a_dry_run_writes_everything_and_submits_nothing(cluster: Cluster, here: Path, config: Path) -> None:
    launched(f"config={config}", "dump_dir=real")
    (cluster.place / "sbatch").unlink()
    (cluster.place / "sinfo").unlink()
    before = cluster.asked
    assert launched(f"config={config}", "dump_dir=a b", "dry_run=true") == f"sbatch '{here}/a b/submit.slurm'"
    assert cluster.asked == before
    assert sorted(os.listdir(here / "a b")) == sorted(os.listdir(here / "real"))
    assert "#SBATCH --gres=gpu:8\n" in (here / "a b" / "submit.slurm").read_text()


def test_the_code_is_a_copy(cluster: Cluster, here: Path, config: Path) -> None:
    launched(f"config={config}", "dump_dir=mine")
    package = package_of("bytelatent")
    copied = {str(file.relative_to(here / "mine" / "code")) for file in (here / "mine" / "code").rglob("*.*")}
    assert copied - {"complete.json"} == {
        str(file.relative_to(package.parent)) for file in package.rglob("*.*") if "__pycache__" not in file.parts
    }
    copy = here / "mine" / "code" / "bytelatent" / "errors.py"
    assert copy.read_bytes() == (package / "errors.py").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a script and its settings: python -m bytelatent.stool"),
        (["nodes=1"], "name a script and its settings"),
        (["config=absent.yaml"], "'absent.yaml' does not exist"),
        (["config={config}", "nodez=2"], "nodez: unknown key; did you mean 'nodes'?"),
        (["config={config}", "steps"], "'steps' is not a setting; write key=value"),
        (["config={config}", "optimizer.lr=1"], "optimizer.lr: settings of the script stand after --"),
        (["config={config}", "--", "optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean 'lr'?"),
        (["config={config}", "--", "steps=none"], "steps: "),
        (["script=bytelatent.generate", "--", "promt=x"], "promt: unknown key; did you mean 'prompt'?"),
        (["script=bytelatent.generate", "--", "sampling.top_p=2"], "sampling.top_p: "),
        (["config={config}", "dump_dir=a", "--", "run=b"], "run: dump_dir is the run's folder"),
        (
            ["config={config}", "script=bytelatent.trian"],
            "no module 'bytelatent.trian'; did you mean 'bytelatent.train'?",
        ),
        (["config={config}", "script=absent"], "script: there is no module 'absent' here"),
        (["config={config}", "partition=gpus"], "partition: the cluster has no 'gpus'; did you mean 'gpu'?"),
        (["config={config}", "dump_dir={config}"], "is a file; name a folder"),
    ],
)
def test_what_will_not_do_is_one_line_and_leaves_nothing(
    cluster: Cluster, here: Path, config: Path, arguments: list[str], message: str
) -> None:
    before = sorted(os.listdir(here))
    with pytest.raises(UserError) as caught:
        launched(*(argument.format(config=config) for argument in arguments))
    assert message in str(caught.value)
    assert sorted(os.listdir(here)) == before
    assert cluster.asked == []


def test_no_slurm_is_one_line(here: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(UserError, match=r"there is no 'sbatch' here; .*dry_run=true"):
        launched(f"config={config}")
    assert sorted(os.listdir(here)) == ["given.yaml", "text.jsonl"]


def test_slurm_refuses(cluster: Cluster, here: Path, config: Path) -> None:
    cluster.install("sbatch", "echo 'sbatch: error: Invalid qos specification' >&2; exit 1\n")
    with pytest.raises(
        UserError, match=r"SLURM did not take the job: .*Invalid qos.*; correct the key and launch it again"
    ):
        launched(f"config={config}", "dump_dir=mine", "qos=high")
    assert not (here / "mine").exists()
    cluster.install("sbatch", "echo '8;other'\n")
    assert launched(f"config={config}", "dump_dir=mine").startswith("job 8 submitted; ")
    assert "qos" not in (here / "mine" / "submit.slurm").read_text()


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(place.relative_to(folder)): place.read_bytes() if place.is_file() else None for place in folder.rglob("*")
    }


REFUSES = "echo 'sbatch: error: Invalid qos specification' >&2; exit 1\n"


@pytest.mark.parametrize("copied", ["copy_code=true", "copy_code=false"])
def test_what_slurm_refuses_leaves_an_earlier_launch_as_it_was(
    cluster: Cluster, here: Path, config: Path, copied: str
) -> None:
    launched(f"config={config}", "dump_dir=mine", copied, "--", "seed=5")
    (here / "mine" / "notes").write_text("mine")
    before = everything(here / "mine")
    cluster.install("sbatch", REFUSES)
    with pytest.raises(UserError, match="SLURM did not take the job"):
        launched(f"config={config}", "dump_dir=mine", "override=true", "qos=high", "--", "seed=6")
    assert everything(here / "mine") == before
    cluster.install("sbatch", "echo 8\n")
    launched(f"config={config}", "dump_dir=mine", "override=true", "--", "seed=6")
    assert yaml.safe_load((here / "mine" / "config.yaml").read_text())["seed"] == 6
    assert sorted(os.listdir(here / "mine")) == ["code", "config.yaml", "launch.yaml", "logs", "notes", "submit.slurm"]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_is_one_line_and_leaves_the_folder_as_it_was(
    cluster: Cluster, here: Path, config: Path, earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        launched(f"config={config}", "dump_dir=mine")
    before = everything(here)

    def full(source: str, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(UserError, match=r"^the disk is full: '.*mine/code' was not written, .{,60}$"):
            launched(f"config={config}", "dump_dir=mine", "override=true")
    assert everything(here) == before
    launched(f"config={config}", "dump_dir=mine", f"override={str(earlier).lower()}")


def test_a_folder_that_cannot_be_made_is_one_line(cluster: Cluster, here: Path, config: Path) -> None:
    (here / "file").touch()
    with pytest.raises(UserError, match="file/mine' cannot be written: Not a directory"):
        launched(f"config={config}", "dump_dir=file/mine")


def test_what_a_job_in_the_queue_will_run_is_not_written_over(cluster: Cluster, here: Path, config: Path) -> None:
    launched(f"config={config}", "dump_dir=a b")
    before = everything(here / "a b")
    (here / "link").symlink_to(here / "a b")
    # Jobs: another one's, none with a script, and one that was submitted by another name of the folder.
    rows = [f"6|{here}/other/submit.slurm", "5|(null)", f"17_2|{here}/link/submit.slurm"]
    cluster.install("squeue", f"""[[ $* == "-h -o %i|%o" ]] && printf '%s\\n' {shlex.join(rows)}\n""")
    for more in ([], ["dry_run=true"]):
        with pytest.raises(
            UserError, match=r"job 17_2 of '.*a b' is pending or running; cancel it \(scancel 17_2\), or"
        ):
            launched(f"config={config}", "dump_dir=a b", "override=true", *more, "--", "seed=6")
    assert everything(here / "a b") == before
    (here / "link").unlink()
    launched(f"config={config}", "dump_dir=a b", "override=true")  # its name leads elsewhere now


def test_where_slurm_does_not_report_whether_a_job_waits(cluster: Cluster, here: Path, config: Path) -> None:
    launched(f"config={config}", "dump_dir=mine")
    before = everything(here / "mine")
    cluster.install("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"a job of '.*mine' may still be pending, and squeue does not answer; name"):
        launched(f"config={config}", "dump_dir=mine", "override=true")
    assert everything(here / "mine") == before


def test_a_controller_that_does_not_answer_is_no_wrong_key(cluster: Cluster, here: Path, config: Path) -> None:
    said = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    cluster.install("sbatch", f"echo '{said}' >&2; exit 1\n")
    with pytest.raises(
        UserError, match=r"SLURM cannot be reached: .*; once it can, sbatch .*/submit.slurm.* submits"
    ) as it:
        launched(f"config={config}")
    assert "override" not in str(it.value)


def test_a_folder_that_is_taken(cluster: Cluster, here: Path, config: Path) -> None:
    (here / "mine").mkdir()
    launched(f"config={config}", "dump_dir=mine")  # an empty folder is free
    (here / "mine" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty; sbatch .*mine/submit.slurm resumes it; .*override=true"):
        launched(f"config={config}", "dump_dir=mine", "nodes=2")
    launched(f"config={config}", "dump_dir=mine", "nodes=2", "override=true")
    assert "--nodes=2" in (here / "mine" / "submit.slurm").read_text()
    assert (here / "mine" / "notes").read_text() == "mine"
    (here / "mine" / "metrics.jsonl").write_text("{}\n")
    before = (here / "mine" / "submit.slurm").read_text()
    with pytest.raises(UserError, match=r"mine' holds a run; sbatch .* resumes it; or name another dump_dir"):
        launched(f"config={config}", "dump_dir=mine", "nodes=3", "override=true")
    assert (here / "mine" / "submit.slurm").read_text() == before


def test_generation_is_launched(cluster: Cluster, here: Path) -> None:
    launched("script=bytelatent.generate", "--", "prompt=x", "sampling.top_p=0.9")
    folder = here / "runs" / "bytelatent_generate"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"prompt": "x", "sampling": {"top_p": 0.9}}
    assert "#SBATCH --no-requeue" in (folder / "submit.slurm").read_text()


def test_other_scripts(cluster: Cluster, stand_in: Callable[[str], None], here: Path) -> None:
    launched("script=stand_in", "partition=cpu", "--", "end=0", "run=elsewhere")
    folder = here / "runs" / "stand_in"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"end": 0, "run": "elsewhere"}
    assert (folder / "code" / "stand_in.py").read_text() == (here / "stand_in.py").read_text()
    assert (folder / "code" / "bytelatent" / "errors.py").is_file()
    assert "#SBATCH --no-requeue" in (folder / "submit.slurm").read_text()


def test_help_shows_examples_and_every_key() -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        print(launched("--help"))
    shown = out.getvalue()
    assert "python -m bytelatent.stool script=bytelatent.train config=" in shown
    assert "sbatch DUMP_DIR/submit.slurm" in shown
    assert "nodes, ngpu, nproc, ncpu, mem, time, partition" in shown
