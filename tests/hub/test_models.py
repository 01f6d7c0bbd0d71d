"""Models of the hub in the Hugging Face cache, from a hub on this machine; the hub's own client is the witness."""

from pathlib import Path

import huggingface_hub
import pytest

from bytelatent.hub import cache, model_exists
from tests.hub.model_folders import (
    MODEL,
    NAME,
    WEIGHTS,
    error_of,
    files_asked_for,
    get,
    head,
    place,
    told_by,
    visible,
    without_weights,
    write,
)
from tests.hub_server import HubServer


def test_what_is_downloaded_and_where(server: HubServer, tmp_path: Path) -> None:
    folder = get()
    assert folder == place(tmp_path) / "snapshots" / head(server)
    assert visible(folder) == MODEL
    assert (place(tmp_path) / "refs" / "main").read_text() == head(server)
    assert files_asked_for(server) == {f"GET {path}": 1 for path in MODEL}


def test_the_hub_client_takes_it_for_its_own(server: HubServer, tmp_path: Path) -> None:
    folder = get()
    server.close()
    assert huggingface_hub.snapshot_download(NAME, local_files_only=True) == str(folder)
    assert huggingface_hub.try_to_load_from_cache(NAME, "config.json") == str(folder / "config.json")
    scan = huggingface_hub.scan_cache_dir(tmp_path / "hub")
    assert scan.warnings == []
    [found] = scan.repos
    [revision] = found.revisions
    assert (found.repo_id, revision.commit_hash, set(revision.refs)) == (NAME, head(server), {"main"})
    assert revision.size_on_disk >= sum(map(len, MODEL.values()))


def test_a_snapshot_of_the_hub_client_is_used_as_it_is(server: HubServer) -> None:
    theirs = Path(huggingface_hub.snapshot_download(NAME))
    assert (theirs / "model.safetensors").is_symlink()
    server.requests.clear()
    assert get() == theirs
    assert files_asked_for(server) == {}


def test_what_the_hub_client_left_out_is_added(server: HubServer) -> None:
    theirs = Path(huggingface_hub.snapshot_download(NAME, allow_patterns=["config.json", "model.safetensors"]))
    server.requests.clear()
    assert get() == theirs
    assert visible(theirs) == MODEL
    assert files_asked_for(server) == {f"GET {path}": 1 for path in MODEL.keys() - {"config.json", "model.safetensors"}}
    assert (theirs / "model.safetensors").is_symlink()


def test_a_second_call_asks_only_what_the_branch_is(server: HubServer) -> None:
    folder = get()
    server.requests.clear()
    assert get() == folder
    assert dict(server.requests) == {f"GET /api/models/{NAME}/revision/main": 1}
    server.close()
    assert get(revision=folder.name) == folder  # a commit stays what it is


def test_pickled_weights_only_where_there_are_no_others(server: HubServer, tmp_path: Path) -> None:
    files = {"params.json": b"{}", "consolidated.pth": b"pickle", "deep/more.pth": b"pickle", "a.bin": b"", "a.py": b""}
    server.add("meta/blt", write(tmp_path / "pickled", files), kind="model")
    assert visible(get("meta/blt", weights=False)) == {"params.json": b"{}"}
    assert visible(get("meta/blt")) == {
        path: files[path] for path in ("params.json", "consolidated.pth", "deep/more.pth")
    }


def test_weights_come_later(server: HubServer) -> None:
    folder = get(weights=False)
    assert visible(folder) == without_weights()
    assert get(weights=False, local_files_only=True) == folder
    assert "does not hold all of" in error_of(local_files_only=True)
    server.requests.clear()
    assert get() == folder
    assert visible(folder) == MODEL
    assert files_asked_for(server) == {f"GET {path}": 1 for path in WEIGHTS}


def test_a_branch_moves_on(server: HubServer, tmp_path: Path) -> None:
    old = get()
    server.add(NAME, write(tmp_path / "new", {"config.json": b"new"}), kind="model")
    new = get()
    assert (visible(old), visible(new)) == (MODEL, {"config.json": b"new"})
    assert get(local_files_only=True) == new
    assert get(revision=old.name, local_files_only=True) == old


def test_a_revision(server: HubServer, tmp_path: Path) -> None:
    server.add(NAME, write(tmp_path / "old", {"config.json": b"old"}), kind="model", branch="v1")
    assert visible(get(revision="v1")) == {"config.json": b"old"}
    assert (place(tmp_path) / "refs" / "v1").read_text() == head(server, branch="v1")
    assert "has no revision 'v2'; it has main, v1" in error_of(revision="v2")
    for outside in ("../../..", "/etc", "a/./b", ".."):
        assert "is no revision of" in error_of(revision=outside)
    assert "has no revision 'xxx" in error_of(revision="x" * 300)  # longer than a file's name can be


def test_only_the_cache(server: HubServer, tmp_path: Path) -> None:
    message = error_of(local_files_only=True)
    assert f"'{tmp_path / 'hub'}' does not hold all of {NAME} at 'main'" in message
    assert f"hf download {NAME}" in message
    assert not (tmp_path / "hub").exists()
    folder = get()
    server.requests.clear()
    assert get(local_files_only=True) == folder
    (folder / "README.md").unlink()
    assert "does not hold all of" in error_of(local_files_only=True)
    assert dict(server.requests) == {}


def test_offline_by_environment(server: HubServer, offline: None) -> None:
    assert "HF_HUB_OFFLINE" in error_of()
    assert not model_exists(NAME)
    assert dict(server.requests) == {}


@pytest.mark.parametrize("damage", ["none", "index", "shard", "counted shard", "dangling link", "weights", "settings"])
def test_a_snapshot_of_another_program_without_the_hub(damage: str, server: HubServer, tmp_path: Path) -> None:
    """Nothing says there what the repository holds; what a model needs must be seen to be there."""
    index = b'{"weight_map": {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}}'
    files = {
        "config.json": b"{}",
        "x.safetensors.index.json": index,
        "x-00001-of-00002.safetensors": b"1",
        "x-00002-of-00002.safetensors": b"2",
    }
    server.add("someone/shards", write(tmp_path / "shards", files), kind="model")
    folder = Path(huggingface_hub.snapshot_download("someone/shards"))
    if damage == "index":
        (folder / "x.safetensors.index.json").unlink()
        (folder / "x.safetensors.index.json").write_text("{")
    if damage == "counted shard":
        (folder / "x.safetensors.index.json").unlink()
    if damage in {"shard", "counted shard"}:
        (folder / "x-00002-of-00002.safetensors").unlink()
    if damage == "dangling link":
        (folder / "x-00002-of-00002.safetensors").resolve().unlink()
    if damage == "weights":
        for path in folder.glob("x*"):
            path.unlink()
    if damage == "settings":
        (folder / "config.json").unlink()
    server.close()
    if damage == "none":
        assert get("someone/shards", local_files_only=True) == folder
        assert get("someone/shards") == folder
    else:
        assert "does not hold all of" in error_of("someone/shards", local_files_only=True)
        assert "cannot be reached" in error_of("someone/shards")


@pytest.mark.parametrize("fails", ["unreachable", "down"])
def test_a_hub_that_does_not_answer(fails: str, server: HubServer) -> None:
    folder = get()
    if fails == "down":
        server.fail(503, times=1, url="/api/")
    else:
        server.close()
    assert told_by() == [f"{NAME}: the hub does not answer; what the cache has is used, commit {folder.name[:8]}"]


def test_a_hub_that_does_not_answer_and_an_empty_cache(server: HubServer) -> None:
    server.close()
    message = error_of()
    assert f"{NAME}: {server.url} cannot be reached" in message
    assert "HF_ENDPOINT" in message


def test_a_file_that_was_lost_or_cut_is_fetched_again(server: HubServer) -> None:
    folder = get()
    (folder / "model.safetensors").write_bytes(b"short")
    (folder / "README.md").unlink()
    server.requests.clear()
    assert visible(get()) == MODEL
    assert files_asked_for(server) == {"GET model.safetensors": 1, "GET README.md": 1}


def test_a_damaged_record_is_made_again(server: HubServer) -> None:
    folder = get()
    for text in ("{", '{"files": [{"path": 1}]}', "[]"):
        (folder / cache.RECORD).write_text(text)
        assert get() == folder
        assert cache.read_record(folder)
