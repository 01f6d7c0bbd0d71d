"""Text that fsspec reaches: in memory, by HTTP, on the hub."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytelatent.errors import UserError
from bytelatent.text import find_files, read_documents
from bytelatent.text.formats import kind_of
from bytelatent.text.streams import TextReader, size_of
from tests.hub_server import HubServer
from tests.text.text_files import KINDS, jsonl, write

TEXTS = [b"one", b"zwei \xc3\xa9"]
LARGE = random.Random(0).randbytes(1 << 20) * 12  # more than fsspec reads ahead


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        write(folder / "data" / f"a.{kind}", TEXTS)
    (folder / "large.txt").write_bytes(LARGE)
    pq.write_table(pa.table({"text": [LARGE[: 1 << 20]] * 8}), folder / "large.parquet", use_dictionary=False)
    return folder


@pytest.fixture(params=["ranges", "whole files"])
def web(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """The address of a plain web server's folder."""
    with HubServer() as server:
        server.add("some/files", folder)
        server.has_ranges = request.param == "ranges"
        yield f"{server.url}/datasets/some/files/resolve/main"


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(str(folder / "data"), "/corpus", recursive=True)
    fs.pipe("/corpus/.hidden/b.jsonl", b"{}")
    yield "memory://corpus"
    fs.rm("/corpus", recursive=True)


def texts(file: str) -> list[bytes]:
    return [document.text for _, document in read_documents(file)]


def test_a_folder_a_glob_and_a_file_in_memory(memory: str) -> None:
    everything = [f"memory:///corpus/a.{kind}" for kind in sorted(KINDS)]
    assert find_files(memory) == everything
    assert find_files(f"{memory}/*.jsonl*") == everything[:3]
    assert find_files(f"{memory}/a.parquet") == everything[3:]
    assert [texts(file) for file in everything] == [TEXTS] * 4
    with pytest.raises(UserError, match="no files at 'memory://corpus/nothing'"):
        find_files(f"{memory}/nothing")


def test_sizes_and_bytes_in_memory(memory: str, folder: Path) -> None:
    for kind in KINDS:
        assert size_of(f"{memory}/a.{kind}") == (folder / "data" / f"a.{kind}").stat().st_size
    for kind in ("jsonl", "jsonl.gz", "jsonl.zst"):
        name = f"{memory}/a.{kind}"
        with TextReader(name, kind_of(name).compression) as file:
            assert file.read() == jsonl(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_in_the_address_is_no_part_of_the_name(kind: str, web: str) -> None:
    (file,) = find_files(f"{web}/data/a.{kind}?sig=abc")
    assert file == f"{web}/data/a.{kind}?sig=abc"
    assert texts(file) == TEXTS


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_by_http(kind: str, web: str, folder: Path) -> None:
    (file,) = find_files(f"{web}/data/a.{kind}")
    assert size_of(file) == (folder / "data" / f"a.{kind}").stat().st_size
    assert texts(file) == TEXTS


def test_a_large_file_by_http(web: str) -> None:
    with TextReader(f"{web}/large.txt", None) as file:
        assert file.read() == LARGE


def test_a_large_parquet_file_needs_ranges(folder: Path) -> None:
    with HubServer() as server:
        server.add("some/files", folder)
        file = f"{server.url}/datasets/some/files/resolve/main/large.parquet"
        assert texts(file) == [LARGE[: 1 << 20]] * 8
        server.has_ranges = False
        with pytest.raises(UserError, match="sends whole files only; download it first"):
            texts(file)


def test_a_web_server_that_has_no_such_file(web: str) -> None:
    with pytest.raises(UserError, match=r"no files at .*404"):
        find_files(f"{web}/data/nothing.jsonl")


def test_a_web_server_that_is_down() -> None:
    with HubServer() as server:
        url = server.url
    with pytest.raises(UserError, match=r"no files at .*Cannot connect"):
        find_files(f"{url}/a.jsonl")


def test_the_hub(folder: Path, tmp_path: Path) -> None:
    """In another process: huggingface_hub reads its environment when it is imported."""
    program = (
        "import sys; from bytelatent.text import find_files, read_documents\n"
        "for place in sys.argv[1:]:\n"
        "    for file in find_files(place):\n"
        "        print(file, [document.text.decode() for _, document in read_documents(file)])"
    )
    base = "hf://datasets/some/files"
    places = [f"{base}/data", f"{base}/data/*.zst", f"{base}@v1/b.jsonl"]
    with HubServer() as server:
        server.add("some/files", folder)
        write(tmp_path / "v1" / "b.jsonl", [b"old"])
        server.add("some/files", tmp_path / "v1", branch="v1")
        environment = os.environ | server.environment | {"HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", program, *places]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    shown = [text.decode() for text in TEXTS]
    assert done.stdout.splitlines() == [
        *(f"{base}/data/a.{kind} {shown}" for kind in sorted(KINDS)),
        f"{base}/data/a.jsonl.zst {shown}",
        f"{base}@v1/b.jsonl ['old']",
    ]


def test_protocols_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/\*\.jsonl' needs a package that is not installed: .*s3fs"):
        find_files("s3://bucket/*.jsonl")
    with pytest.raises(UserError, match="cannot be reached: Protocol not known: nowhere"):
        find_files("nowhere://bucket/a.jsonl")
