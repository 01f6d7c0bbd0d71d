"""Models of the hub in the Hugging Face cache, from a hub on this machine."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import validate_repo_id

from bytelatent.errors import UserError
from bytelatent.hub import is_repository_name, model_exists, model_folder
from tests.hub_server import HubServer

NAME = "someone/blt-1b"
MODEL = {
    "config.json": b"{}",
    "README.md": b"the card",
    "LICENSE.txt": b"the licence",
    "original/USE_POLICY": b"the policy",
    "entropy_model/params.json": b"{ }",
    "model.safetensors": bytes(range(256)) * 4096,
    "entropy_model/model.safetensors": b"entropies",
}
WEIGHTS = ("model.safetensors", "entropy_model/model.safetensors")
WITHOUT_WEIGHTS = {path: data for path, data in MODEL.items() if path not in WEIGHTS}
OTHERS = {
    ".gitattributes": b"*",
    ".hidden/config.json": b"h",
    "consolidated.pth": b"pickle",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"import os",
    "picture.png": b"png",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(NAME, write(tmp_path / "repository", MODEL | OTHERS), kind="model")
        server.connect(monkeypatch, tmp_path)
        yield server


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def error_of(name: str = NAME, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        model_folder(name, **options)
    return str(caught.value)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def head(server: HubServer, branch: str = "main") -> str:
    return server.repositories["model", NAME].branches[branch]


def test_what_is_downloaded_and_where(server: HubServer, tmp_path: Path) -> None:
    folder = model_folder(NAME)
    assert folder == tmp_path / "hub" / "models--someone--blt-1b" / "snapshots" / head(server)
    assert files_in(folder) == MODEL
    assert huggingface_hub.try_to_load_from_cache(NAME, "README.md") == str(folder / "README.md")


def test_a_snapshot_of_another_program_is_completed(server: HubServer) -> None:
    theirs = Path(huggingface_hub.snapshot_download(NAME, allow_patterns=["config.json", "model.safetensors"]))
    server.requests.clear()
    assert model_folder(NAME) == theirs
    assert files_in(theirs) == MODEL
    assert server.requests["GET model.safetensors"] == 0
    assert server.requests["GET README.md"] == 1


def test_pickled_weights_only_where_there_are_no_others(server: HubServer, tmp_path: Path) -> None:
    files = {"params.json": b"{}", "consolidated.pth": b"pickle", "deep/more.pth": b"pickle", "a.bin": b"", "a.py": b""}
    server.add("meta/blt", write(tmp_path / "pickled", files), kind="model")
    assert files_in(model_folder("meta/blt", weights=False)) == {"params.json": b"{}"}
    wanted = {path: files[path] for path in ("params.json", "consolidated.pth", "deep/more.pth")}
    assert files_in(model_folder("meta/blt")) == wanted


def test_weights_come_later(server: HubServer) -> None:
    folder = model_folder(NAME, weights=False)
    assert files_in(folder) == WITHOUT_WEIGHTS
    assert model_folder(NAME, weights=False, local_files_only=True) == folder
    assert "does not hold all of" in error_of(local_files_only=True)
    assert model_folder(NAME) == folder
    assert files_in(folder) == MODEL


def test_revisions(server: HubServer, tmp_path: Path) -> None:
    old = model_folder(NAME)
    server.add(NAME, write(tmp_path / "new", {"config.json": b"new"}), kind="model")
    server.add(NAME, write(tmp_path / "old", {"config.json": b"old"}), kind="model", branch="v1")
    new = model_folder(NAME)
    assert (files_in(old), files_in(new)) == (MODEL, {"config.json": b"new"})
    assert model_folder(NAME, revision=old.name, local_files_only=True) == old
    assert files_in(model_folder(NAME, revision="v1")) == {"config.json": b"old"}
    assert "has no revision 'v2'; it has main, v1" in error_of(revision="v2")


def test_only_the_cache(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = error_of(local_files_only=True)
    assert f"'{tmp_path / 'hub'}' does not hold all of {NAME} at 'main'" in message
    assert f"hf download {NAME}" in message
    assert not model_exists(NAME, local_files_only=True)
    folder = model_folder(NAME)
    server.requests.clear()
    assert model_folder(NAME, local_files_only=True) == folder
    assert model_exists(NAME, local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_folder(NAME) == folder
    assert "HF_HUB_OFFLINE" in error_of("someone/else")
    assert not server.requests


@pytest.mark.parametrize("fails", ["unreachable", "down"])
def test_a_hub_that_does_not_answer(fails: str, server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    folder = model_folder(NAME)
    if fails == "down":
        server.fail(503, times=50, url="/api/")
    else:
        server.close()
    assert model_folder(NAME) == folder
    line = f"{NAME}: the hub does not answer; using the cached commit {folder.name[:8]}"
    assert line in [record.getMessage() for record in caplog.records]


def test_a_hub_that_does_not_answer_and_an_empty_cache(server: HubServer) -> None:
    server.close()
    message = error_of()
    assert f"{NAME}: {server.url} cannot be reached" in message
    assert "HF_ENDPOINT" in message


def test_gated(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["model", NAME].readers = {"hf_good"}
    server.repositories["model", NAME].redirects = True  # the storage refuses whoever shows it a token
    page = f"https://huggingface.co/{NAME}"
    way_out = "then pass token=..., set HF_TOKEN, or run: hf auth login"
    assert error_of() == f"{NAME} needs access: open {page}, accept the terms, {way_out}"
    message = f"{NAME} needs access that your token does not have: open {page}, accept the terms"
    assert error_of(token="hf_other") == message
    assert model_exists(NAME)
    assert files_in(model_folder(NAME, token="hf_good", weights=False)) == WITHOUT_WEIGHTS
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert files_in(model_folder(NAME)) == MODEL


def test_missing_and_private(server: HubServer) -> None:
    message = error_of("someone/else")
    assert "there is no model 'someone/else' on the hub, or it is private" in message
    assert "token=..." in message
    assert not model_exists("someone/else")
    server.repositories["model", NAME].private = True
    server.repositories["model", NAME].readers = {"hf_good"}
    assert "or it is private" in error_of()
    assert not model_exists(NAME)
    assert model_exists(NAME, token="hf_good")


def test_a_token_that_the_hub_does_not_know(server: HubServer) -> None:
    server.fail(401, times=10, url="/api/")
    with pytest.raises(UserError):
        model_exists("someone/blt-entropy", token="hf_bad")


def test_a_repository_that_is_no_model(server: HubServer, tmp_path: Path) -> None:
    server.add("someone/pictures", write(tmp_path / "pictures", {"a.png": b"", "b.bin": b""}), kind="model")
    assert "someone/pictures holds no model at 'main'; it has a.png, b.bin" in error_of("someone/pictures")


def test_a_cache_that_cannot_be_written(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    message = error_of()
    assert f"'{tmp_path / 'hub'}" in message
    assert "cannot be written" in message
    assert "HF_HUB_CACHE" in message


def test_names() -> None:
    for name in ("facebook/blt-1b", "a/b", "some_one/name.v1.0", "_/x", "9/9"):
        assert is_repository_name(name)
        validate_repo_id(name)
    for name in ("", "a", "a/", "/a", "/a/b", "./a", "../a", "~/a", "a/b/c", ".a/b", "a/.b", "a/b.git", "a/b--c"):
        assert not is_repository_name(name)
    for name in ("a/b..c", "a/b c", "a/é", "hf://a/b", "a\\b/c", "a/b\n", "-a/b", "a/b-", "a/" + "b" * 95):
        assert not is_repository_name(name)
        assert "is not the name of a model on the hub; write OWNER/NAME" in error_of(name)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'bytelatent[hf]'" in error_of()
