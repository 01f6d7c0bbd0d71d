"""Data sets of the hub, from a hub on this machine."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bytelatent.errors import UserError
from bytelatent.prepare.download import DATASETS, DONE, UNFINISHED, dataset_name, download_dataset, is_hub
from tests.hub_server import HubServer

NAME = "someone/texts"
SOURCE = f"hf://datasets/{NAME}"
BIG = bytes(range(256)) * 4096  # 1 MiB
FILES = {
    "README.md": b"the card",
    ".gitattributes": b"*",
    "data/a.parquet": b"parquet a",
    "data/more/b.parquet": b"parquet b",
    "sample/10BT/0.parquet": b"sample",
    "deep/one/two/c.jsonl.zst": b"c",
    "big.jsonl": BIG,
    "empty.txt": b"",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(NAME, write(tmp_path / "repository"))
        server.connect(monkeypatch, tmp_path)
        yield server


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def get(source: str, folder: Path, **options: Any) -> dict[str, bytes]:
    """What a download leaves in `folder`, hidden files apart."""
    assert download_dataset(source, folder, **options) == folder
    return visible(folder)


def visible(folder: Path) -> dict[str, bytes]:
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    return {path: data for path, data in files.items() if not any(p.startswith(".") for p in Path(path).parts)}


def error_of(source: str, folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        get(source, folder, **options)
    return str(caught.value)


def of(*paths: str) -> dict[str, bytes]:
    return {path: FILES[path] for path in paths}


@pytest.mark.parametrize(
    ("source", "paths"),
    [
        ("hf://datasets/someone/texts/data/**/*.parquet", ["data/a.parquet", "data/more/b.parquet"]),
        ("hf://someone/texts/data/*.parquet", ["data/a.parquet"]),
        ("hf://datasets/someone/texts/**/*.jsonl.zst", ["deep/one/two/c.jsonl.zst"]),
        ("hf://datasets/someone/texts@main/deep", ["deep/one/two/c.jsonl.zst"]),
        ("hf://datasets/someone/texts/README.md", ["README.md"]),
        ("hf://datasets/someone/texts/empty.txt", ["empty.txt"]),
        ("hf://someone/texts", [path for path in FILES if path not in {"README.md", ".gitattributes"}]),
    ],
)
def test_addresses_and_patterns(source: str, paths: list[str], server: HubServer, tmp_path: Path) -> None:
    assert is_hub(source)
    assert dataset_name(source) == "texts"
    assert get(source, tmp_path / "out") == of(*paths)


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("fineweb_edu", ["data/a.parquet", "data/more/b.parquet"]),
        ("fineweb_edu_10bt", ["sample/10BT/0.parquet"]),
        ("dclm_baseline_1.0", ["deep/one/two/c.jsonl.zst"]),
    ],
)
def test_known_names(name: str, paths: list[str], server: HubServer, tmp_path: Path) -> None:
    server.add(DATASETS[name][0], tmp_path / "repository")
    assert is_hub(name)
    assert get(name, tmp_path / "out") == of(*paths)


def test_only_the_fixed_folder_is_listed(server: HubServer, tmp_path: Path) -> None:
    get(f"{SOURCE}/sample/10BT/*.parquet", tmp_path / "out")
    commit = server.repositories["dataset", NAME].branches["main"]
    assert server.requests[f"GET /api/datasets/{NAME}/tree/{commit}/sample%2F10BT"] == 1
    assert server.requests[f"GET /api/datasets/{NAME}/tree/{commit}"] == 0


def test_long_listings_come_in_pages(server: HubServer, tmp_path: Path) -> None:
    many = {f"data/{i}.txt": b"%d" % i for i in range(23)}
    server.add("someone/many", write(tmp_path / "many", many))
    server.page_size = 5
    assert get("hf://someone/many/data/*.txt", tmp_path / "out") == many


def test_what_is_no_data_set(tmp_path: Path) -> None:
    for source in ("text/*.jsonl", "data", "s3://bucket/a", "hf://models/someone/model", "hf://buckets/a/b"):
        assert not is_hub(source)
    assert "did you mean 'fineweb_edu'?" in error_of("fineweb-edu", tmp_path)
    assert "write hf://datasets/OWNER/NAME" in error_of("hf://datasets/alone", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_call_needs_no_hub(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = get(SOURCE, folder)
    record = json.loads((folder / DONE).read_text())
    assert record["commit"] == server.repositories["dataset", NAME].branches["main"]
    assert {file["path"]: file["size"] for file in record["files"]} == {p: len(d) for p, d in first.items()}
    assert not (folder / UNFINISHED).exists()
    server.close()
    assert get(SOURCE, folder) == first


def test_a_file_that_was_lost_is_fetched_again(server: HubServer, tmp_path: Path) -> None:
    whole = get(SOURCE, tmp_path / "out")
    (tmp_path / "out" / "big.jsonl").write_bytes(b"short")
    server.requests.clear()
    assert get(SOURCE, tmp_path / "out") == whole
    assert {what: n for what, n in server.requests.items() if what.startswith("GET ") and "/api/" not in what} == {
        "GET big.jsonl": 1
    }


def test_no_server(server: HubServer, tmp_path: Path) -> None:
    server.close()
    message = error_of(SOURCE, tmp_path / "out")
    assert f"{server.url} cannot be reached" in message
    assert "HF_ENDPOINT" in message


def test_a_stopped_download_stays_with_its_commit(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of two commits are not mixed: the branch moves on between the calls."""
    source, folder = f"{SOURCE}/data/**/*.parquet", tmp_path / "out"
    server.fail(404, url="/resolve/.*/b.parquet")
    error_of(source, folder)
    (tmp_path / "repository" / "data" / "more" / "b.parquet").write_bytes(b"another b")
    server.add(NAME, tmp_path / "repository")
    assert get(source, folder) == of("data/a.parquet", "data/more/b.parquet")
    assert server.requests["GET data/a.parquet"] == 1
    assert get(source, tmp_path / "new")["data/more/b.parquet"] == b"another b"


def test_a_revision(server: HubServer, tmp_path: Path) -> None:
    server.add(NAME, write(tmp_path / "old", {"old.txt": b"old"}), branch="v1")
    old = server.repositories["dataset", NAME].branches["v1"]
    assert get(f"{SOURCE}@v1", tmp_path / "a") == {"old.txt": b"old"}
    assert get(f"{SOURCE}@{old}/old.txt", tmp_path / "c") == {"old.txt": b"old"}
    message = error_of(f"{SOURCE}@v2", tmp_path / "d")
    assert "has no revision 'v2'; it has main, v1" in message


def test_gated(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["dataset", NAME].readers = {"hf_good"}
    server.repositories["dataset", NAME].redirects = True  # the storage refuses whoever shows it a key
    message = error_of(f"{SOURCE}/data", tmp_path / "out")
    assert message == (
        f"{NAME} needs access: open https://huggingface.co/datasets/{NAME}, accept the terms, "
        "then pass token=..., set HF_TOKEN, or run: hf auth login"
    )
    assert "your token does not have" in error_of(f"{SOURCE}/data", tmp_path / "out", token="hf_other")
    assert get(f"{SOURCE}/data", tmp_path / "out", token="hf_good") == of("data/a.parquet", "data/more/b.parquet")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert get(f"{SOURCE}/data/*.parquet", tmp_path / "by environment") == of("data/a.parquet")


def test_missing_and_private_repositories(server: HubServer, tmp_path: Path) -> None:
    assert "there is no data set 'someone/else' on the hub, or it is private" in error_of(
        "hf://someone/else", tmp_path / "out"
    )
    server.repositories["dataset", NAME].private = True
    server.repositories["dataset", NAME].readers = {"hf_good"}
    assert "or it is private" in error_of(SOURCE, tmp_path / "out")
    assert get(SOURCE, tmp_path / "out", token="hf_good")
    assert "is not the name of a repository" in error_of("hf://someone/a..b", tmp_path / "new")


def test_a_pattern_without_files_names_some_that_exist(server: HubServer, tmp_path: Path) -> None:
    message = error_of(f"{SOURCE}/data/*.jsonl", tmp_path / "out")
    assert "no file 'data/*.jsonl' at 'main'; it has .gitattributes, README.md, big.jsonl" in message
    assert "README.md" in error_of(f"{SOURCE}/nowhere", tmp_path / "out")


def test_a_folder_of_something_else(server: HubServer, tmp_path: Path) -> None:
    get(f"{SOURCE}/data", tmp_path / "out")
    assert "choose another folder" in error_of(f"{SOURCE}/deep", tmp_path / "out")
    (tmp_path / "out" / DONE).write_text("{")
    assert "is corrupt" in error_of(f"{SOURCE}/data", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "cannot be written" in error_of(SOURCE, tmp_path / "file")


def test_offline(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(SOURCE, tmp_path / "out")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'bytelatent[data]'" in error_of("fineweb_edu", tmp_path / "out")


def test_a_size_that_is_not_as_listed(server: HubServer, tmp_path: Path) -> None:
    server.repositories["dataset", NAME].listed_sizes["data/a.parquet"] = 5
    assert "'data/a.parquet' has another size than the hub lists" in error_of(f"{SOURCE}/data", tmp_path / "out")
