"""Credentials in addresses are used, and are in nothing that is written or shown."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bytelatent.commands import launch as stool
from bytelatent.commands.calibrate import calibrate_text
from bytelatent.commands.options import CalibrateSettings
from bytelatent.config import load_yaml
from bytelatent.credentials import masked, moved_to_environment
from bytelatent.errors import UserError
from bytelatent.prepare import PrepareSettings, prepare
from bytelatent.report import compare_runs
from bytelatent.training import train
from bytelatent.weights import convert, open_pretrained
from tests.hub_server import HubServer
from tests.launch.conftest import Cluster, cluster
from tests.training.test_trackers import Wandb, wandb
from tests.training.tiny_runs import blt_run, byte_lm_run, losses, settings, write_text

KEYS = ("hunter2", "s3cr3t", "n3wer")

FIXTURES = (cluster, wandb)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (
            "https://user:hunter2@host/a.jsonl?sig=s3cr3t&se=2030#t=hunter2",
            "https://***@host/a.jsonl?sig=***&se=***#t=***",
        ),
        ("https://hunter2@host/a.jsonl", "https://***@host/a.jsonl"),
        ("https://:hunter2@host:8080/a", "https://***@host:8080/a"),
        ("https://user:p@ss'hunter2@host/a", "https://***@host/a"),
        ("s3://KEY:hunter/2+hunter2@bucket/a/*.jsonl", "s3://***@bucket/a/*.jsonl"),
        ("abfs://box:hunter2@host/a", "abfs://***@host/a"),
        ("simplecache::https://u:hunter2@host/a.gz", "simplecache::https://***@host/a.gz"),
        ("zip://*.csv::https://u:hunter2@host/a.zip?t=hunter2", "zip://*.csv::https://***@host/a.zip?t=***"),
        ("'https://host/a?hunter2' does not exist", "'https://host/a?***' does not exist"),
        ("a https://u:hunter2@h/a, b ftp://v:s3cr3t@i/b; c", "a https://***@h/a, b ftp://***@i/b; c"),
    ],
)
def test_what_is_masked(given: str, shown: str) -> None:
    assert masked(given) == shown
    assert masked(shown) == shown
    assert str(UserError(given)) == shown
    assert masked({"a": [given, 1, None]}) == {"a": [shown, 1, None]}


@pytest.mark.parametrize(
    "text",
    [
        "text/a@b:c?d=e.jsonl",
        "s3://bucket/part-?.jsonl",
        "hf://datasets/owner/name@main/a.parquet",
        "abfs://container@account.host/a",
        "sftp://me@host/a",
        "http://host:8080/a@b",
        "memory://a/b.jsonl",
    ],
)
def test_what_is_not(text: str) -> None:
    assert masked(text) == text


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of rows of text, by a server that looks neither at the user nor at the signature."""
    folder = tmp_path / "served"
    folder.mkdir()
    for seed, name in enumerate(("rows", "others")):
        write_text(folder / f"{name}.jsonl", seed)
    with HubServer() as server:
        server.add("some/files", folder)
        host = server.url.removeprefix("http://")
        yield f"http://user:hunter2@{host}/datasets/some/files/resolve/main/rows.jsonl?sig=s3cr3t"


def leaks(*folders: Path) -> list[str]:
    """Files that hold a key, in their content or their name."""
    files = [Path(place, name) for folder in folders for place, _, names in os.walk(folder) for name in names]
    assert files
    keys = [key.encode() for key in KEYS]
    return [str(file) for file in files if any(key in file.read_bytes() + os.fsencode(file) for key in keys)]


def test_a_run_writes_and_says_none(tmp_path: Path, address: str, capfd: pytest.CaptureFixture[str]) -> None:
    def data(address: str) -> dict[str, Any]:
        return {"data": {"train": address, "valid": address}, "track": ["tensorboard"]}

    byte_lm = train(settings(byte_lm_run(tmp_path / "byte_lm", Path("x"), steps=5, **data(address))))
    run = train(settings(blt_run(tmp_path / "run", Path("x"), byte_lm, steps=5, **data(address))))
    for kind in ("native", "hf"):
        convert(open_pretrained(str(run)), tmp_path / kind, kind)
    comparison = compare_runs([byte_lm, run])
    found, _ = calibrate_text(CalibrateSettings(text=[address], patch_bytes=4, model=str(byte_lm), device="cpu"))
    assert found.data == masked(address)
    again = address.replace("s3cr3t", "n3wer")  # signatures run out
    train(settings(blt_run(run, Path("x"), byte_lm, steps=8, **data(again))))
    assert len(losses(run)) > 8
    with pytest.raises(UserError, match=r"http://\*\*\*@.*nothing.jsonl\?sig=\*\*\*"):
        train(settings(byte_lm_run(tmp_path / "other", Path("x"), **data(address.replace("rows", "nothing")))))
    with pytest.raises(UserError, match=r"begun with other settings \(data.train: .*http://\*\*\*@") as caught:
        train(settings(byte_lm_run(byte_lm, Path("x"), **data(address.replace("rows", "others")))))
    said = "".join([str(caught.value), str(comparison.plain()), *capfd.readouterr()])
    assert not any(key in said for key in KEYS)
    assert load_yaml(run / "settings.yaml")["data"]["train"][0]["path"] == masked(address)
    assert masked(address) in (tmp_path / "native" / "README.md").read_text()
    shutil.rmtree(tmp_path / "served")
    assert leaks(tmp_path) == []


def test_wandb_is_given_none(tmp_path: Path, address: str, wandb: Wandb) -> None:
    train(settings(byte_lm_run(tmp_path / "run", Path("x"), steps=2, data={"train": address}, track=["wandb"])))
    [given] = wandb.begun
    assert given["config"]["data"]["train"][0]["path"] == masked(address)
    assert not any(key in str(given) for key in KEYS)


def test_a_prepared_folder_holds_none(tmp_path: Path, address: str) -> None:
    out = tmp_path / "out"

    def again(address: str) -> Path:
        return prepare(PrepareSettings(source=[address], out=out, chunks=1, validation=0))

    again(address)
    assert again(address.replace("s3cr3t", "n3wer")) == out
    assert masked(address) in (out / "manifest.json").read_text()
    assert leaks(out) == []


def test_a_job_finds_them_in_its_environment(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.install("sbatch", 'echo "$BLT_DATA_TRAIN_0" >>{log}; echo 7\n')
    address = "https://user:hunter2@host/a.jsonl?sig=s3cr3t"
    given = tmp_path / "given.yaml"
    given.write_text(yaml.safe_dump(byte_lm_run(tmp_path / "run", Path("x"), data={"train": [address]})))
    line = stool.main([f"config={given}", "nodes=1", "partition=gpu"])
    assert cluster.asked == [address]
    cluster.log.unlink()
    assert "needs the addresses with credentials in its environment: BLT_DATA_TRAIN_0" in line
    given.unlink()
    assert leaks(tmp_path / "run") == []
    monkeypatch.setenv("BLT_DATA_TRAIN_0", address)
    assert load_yaml(tmp_path / "run" / "config.yaml")["data"]["train"] == [address]
    monkeypatch.delenv("BLT_DATA_TRAIN_0")
    with pytest.raises(UserError, match="BLT_DATA_TRAIN_0"):
        load_yaml(tmp_path / "run" / "config.yaml")


def test_settings_without_credentials_stay_as_they_are() -> None:
    values = {"a": [1, None, "s3://b/c-?.jsonl", {"b": "${oc.env:HOME}"}]}
    assert moved_to_environment(values) == (values, {})
