"""Links that somebody put where we write or copy from: what they lead to is neither written nor copied."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bytelatent import BLT
from bytelatent.data.shards import Shard, lock_shards
from bytelatent.errors import UserError
from bytelatent.files import growing_file, only_writer, partial_path, whole_file, whole_folder
from bytelatent.patching import PatchSettings
from bytelatent.prepare.plan import TaskFiles
from bytelatent.prepare.scatter import RunWriter
from bytelatent.training.metrics import JsonLines
from bytelatent.weights import Config, convert, open_pretrained, save
from tests.model.tiny import tiny_blt, tiny_byte_lm

TEXT = '{"step": 1}\nnot mine\nhalf a line'


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "victim"
    place.write_text(TEXT)
    yield place
    assert place.read_text() == TEXT
    assert not place.is_symlink()


def into(context: Callable[[Path], object]) -> Callable[[Path], None]:
    def enter(folder: Path) -> None:
        manager = context(folder)
        with manager if hasattr(manager, "__enter__") else nullcontext():  # type: ignore[attr-defined]
            pass

    return enter


def go_on(folder: Path) -> None:
    rows = JsonLines(folder / "metrics.jsonl")
    rows.resume_after(1)
    rows.write({"step": 2})


def set_aside(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("damaged\n")
    JsonLines(folder / "rows.jsonl").resume_after(1)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".lock": into(only_writer),
    ".lock of shards": into(lambda folder: lock_shards(folder, [Shard("a.jsonl", "a", 1)])),
    "out.jsonl.part": into(lambda folder: growing_file(folder / "out.jsonl")),
    "metrics.jsonl": go_on,
    "rows.jsonl.damaged": set_aside,
    "00003.data": lambda folder: RunWriter(TaskFiles(folder, 3), 4, 2**16, False).close(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_where_we_write_is_named(name: str, victim: Path, tmp_path: Path) -> None:
    link = tmp_path / "folder" / name.split()[0]
    link.parent.mkdir()
    link.symlink_to(victim)
    with pytest.raises(UserError, match=f"'{link}' is a link, and would be written through; remove it"):
        WRITERS[name](link.parent)
    assert link.is_symlink()


def test_no_file_is_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a link"), only_writer(tmp_path):
        pass
    assert not (tmp_path / "nowhere").exists()


def test_what_a_lock_holds_stays(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("of another program")
    with only_writer(tmp_path), lock_shards(tmp_path, []):
        pass
    assert (tmp_path / ".lock").read_text() == "of another program"


def test_files_that_are_being_written(victim: Path, tmp_path: Path) -> None:
    """Their names can be known beforehand, too."""
    for place in (partial_path(tmp_path / "a"), tmp_path / "a"):
        (tmp_path / f".{place.name}.{os.getpid()}.part").symlink_to(victim)
        with whole_file(place) as aside:
            aside.write_text("new")
        assert place.read_text() == "new"
        assert not place.is_symlink()
    (tmp_path / f".b.{os.getpid()}.part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="cannot be written"), whole_folder(tmp_path / "b") as aside:
        (aside / "file").write_text("new")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_link_that_is_replaced(victim: Path, tmp_path: Path) -> None:
    """By a file of its own; nothing is left of it."""
    (tmp_path / "a").symlink_to(victim)
    with whole_file(tmp_path / "a") as aside:
        aside.write_text("new")
    (tmp_path / "real").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "real")
    with whole_folder(tmp_path / "b") as aside:
        (aside / "file").write_text("new")
    assert (tmp_path / "b" / "file").read_text() == "new"
    assert list((tmp_path / "real").iterdir()) == []
    assert {place.name for place in tmp_path.iterdir()} == {"victim", "a", "real", "b"}


@pytest.mark.skipif(os.name == "nt", reason="jobs of SLURM")
def test_the_log_of_a_job(victim: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "7" / "0.out"
    log.parent.mkdir(parents=True)
    log.symlink_to(victim)
    environment = {**os.environ, "DUMP_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    command = [sys.executable, "-c", "from bytelatent.launch.worker import main; main(['this'])"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"error: '{log}' is a link, and would be written through; remove it\n"


def write_model(folder: Path) -> Path:
    model = tiny_blt()
    BLT(model, Config(model=model.settings, context=64, patching=PatchSettings(mode="byte")), None).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("name", ["NOTICE", "LICENSE", "LICENCE.md", "USE_POLICY.txt"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_licence_that_leads_elsewhere_is_not_copied(name: str, relative: bool, victim: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    (source / name).symlink_to("../victim" if relative else victim)
    found = open_pretrained(source)
    assert found.warnings == [f"'{source / name}' is a link out of its folder and is skipped"]
    assert found.config.origin.licence is None
    convert(found, tmp_path / "converted", "native")
    assert not (tmp_path / "converted" / name).exists()
    assert not any(TEXT.encode() in file.read_bytes() for file in (tmp_path / "converted").rglob("*") if file.is_file())


def test_notices_of_the_model_itself_are_copied(tmp_path: Path) -> None:
    """As the hub's cache has them, and as links inside the folder."""
    snapshot = write_model(tmp_path / "models--a--b" / "snapshots" / "0123")
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "beef").write_text("the terms")
    (tmp_path / "models--a--b" / "secret").write_text("secret")
    (snapshot / "LICENSE").symlink_to("../../blobs/beef")
    (snapshot / "LICENSE.txt").symlink_to("LICENSE")
    (snapshot / "NOTICE").symlink_to("../../secret")
    (snapshot / "NOTICE.loop").symlink_to("NOTICE.loop")
    convert(open_pretrained(snapshot), tmp_path / "converted", "native")
    copied = {file.name for pattern in ("LICEN*", "NOTICE*") for file in (tmp_path / "converted").glob(pattern)}
    assert copied == {"LICENSE", "LICENSE.txt"}
    assert (tmp_path / "converted" / "LICENSE.txt").read_text() == "the terms"


def test_weights_may_be_links(tmp_path: Path) -> None:
    """Large files lie on other disks; they are read as weights, or not at all."""
    byte_lm = tiny_byte_lm()
    save(tmp_path, byte_lm, Config(model=byte_lm.settings, context=64))
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path.parent / "weights")
    assert torch.equal(open_pretrained(tmp_path).load().model.output.weight, byte_lm.output.weight)
