"""The published command lines below setup/, run as a user runs them: from another folder, in a process of their own."""

import gzip
import hashlib
import importlib.util
import json
import os
import pty
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bytelatent.errors import UserError
from bytelatent.prepare.download import TIKTOKEN_SHA256, download_tokenizer
from bytelatent.study import speedrun_text
from tests.hub_server import HubServer
from tests.text.text_files import jsonl

SETUP = Path(__file__).parents[2] / "setup"
LLAMA3 = "meta-llama/Meta-Llama-3-8B"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def run(
    script: str, *arguments: str, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SETUP / script), *arguments]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = clean | {"HF_HOME": str(cwd / "hub")} | (environment or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line a script ended with."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


def ids(lines: bytes) -> list[bytes]:
    return sorted(json.loads(line)["text"].encode() for line in lines.splitlines())


def prepared(folder: Path, name: str) -> list[bytes]:
    """The texts of a prepared folder, from chunks and held-out file together."""
    files = [file for file in folder.glob(f"{name}.*.jsonl*") if file.suffix == ".jsonl"]
    return sorted(text for file in files for text in ids(file.read_bytes()))


def test_download_and_prepare(server: HubServer, tmp_path: Path) -> None:
    documents = [b"document %d" % i for i in range(40)]
    source = tmp_path / "repository" / "data" / "part.jsonl"
    source.parent.mkdir(parents=True)
    source.write_bytes(jsonl(documents))
    server.add("someone/texts", tmp_path / "repository")
    arguments = ["hf://datasets/someone/texts/data/*.jsonl", "1", "--nchunks", "4", "--validation", "3"]
    done = run("download_prepare_hf_data.py", *arguments, cwd=tmp_path, environment=server.environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "texts" / "data" / "part.jsonl").read_bytes() == source.read_bytes()
    out = tmp_path / "data" / "texts_shuffled"
    assert len(list(out.glob("texts.chunk.*.jsonl"))) == 4
    assert prepared(out, "texts") == sorted(documents)


def test_a_folder_is_prepared_without_a_download(tmp_path: Path) -> None:
    (tmp_path / "my.texts").mkdir()
    (tmp_path / "my.texts" / "a.jsonl").write_bytes(jsonl([b"one", b"two", b"three"]))
    arguments = ["my.texts", "0.5", "--data_dir", "out", "--nchunks", "2", "--validation", "1", "--seed", "7"]
    done = run("download_prepare_hf_data.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert prepared(tmp_path / "out" / "my.texts_shuffled", "my.texts") == [b"one", b"three", b"two"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("fineweb-edu", "did you mean 'fineweb_edu'?"), ("./nowhere", "'./nowhere' is no folder")],
)
def test_a_wrong_name(name: str, shown: str, tmp_path: Path) -> None:
    assert shown in error_of(run("download_prepare_hf_data.py", name, "1", cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_llama3_with_a_key(server: HubServer, tmp_path: Path) -> None:
    files = {"original/tokenizer.model": b"the model", "tokenizer.json": b"{}", "weights.bin": b"large"}
    for path, data in files.items():
        (tmp_path / "repository" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / path).write_bytes(data)
    server.add(LLAMA3, tmp_path / "repository", kind="model").readers = {"hf_mine"}
    arguments = ["llama3", "tokenizers", "--api_key", "hf_mine"]
    done = run("download_tokenizer.py", *arguments, cwd=tmp_path, environment=server.environment)
    assert done.stdout.splitlines() == ["tokenizers/original/tokenizer.model", "tokenizers/tokenizer.json"]
    folder = tmp_path / "tokenizers"
    written = {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and ".cache" not in f.parts
    }
    assert written == {path: data for path, data in files.items() if path != "weights.bin"}

    done = run("download_tokenizer.py", "llama3", "elsewhere", cwd=tmp_path, environment=server.environment)
    assert error_of(done) == (
        f"error: {LLAMA3} needs access: open https://huggingface.co/{LLAMA3}, accept the terms, "
        "then pass token=..., set HF_TOKEN, or run: hf auth login"
    )


@pytest.fixture
def gated(server: HubServer, tmp_path: Path) -> HubServer:
    """The hub with a tokenizer that `hf_mine` alone may read."""
    place = tmp_path / "repository" / "original"
    place.mkdir(parents=True)
    (place / "tokenizer.model").write_bytes(b"the model")
    server.add(LLAMA3, tmp_path / "repository", kind="model").readers = {"hf_mine"}
    return server


def test_a_key_from_the_environment(gated: HubServer, tmp_path: Path) -> None:
    environment = {**gated.environment, "HF_TOKEN": "hf_mine"}
    done = run("download_tokenizer.py", "llama3", "out", cwd=tmp_path, environment=environment)
    assert done.stdout.splitlines() == ["out/original/tokenizer.model"]


def test_a_key_that_is_typed_is_not_shown(gated: HubServer, tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    command = [sys.executable, str(SETUP / "download_tokenizer.py"), "llama3", "out", "--api_key"]
    environment = {**os.environ, **gated.environment, "HF_HOME": str(tmp_path / "hub")}
    asked = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    shown = b""
    while b"not shown" not in shown:
        shown += os.read(main, 1000)
    os.write(main, b"hf_mine\n")
    os.close(terminal)
    with suppress(OSError):  # the end, as Linux says it
        while more := os.read(main, 1000):
            shown += more
    os.close(main)
    assert asked.wait(timeout=60) == 0, shown
    assert b"hf_mine" not in shown
    assert (tmp_path / "out" / "original" / "tokenizer.model").read_bytes() == b"the model"


@pytest.mark.parametrize("script", ["download_tokenizer.py", "download_prepare_hf_data.py"])
def test_a_key_that_cannot_be_one_is_not_repeated(script: str, tmp_path: Path) -> None:
    given = {"download_tokenizer.py": ["llama3", "out"], "download_prepare_hf_data.py": ["fineweb_edu", "1"]}[script]
    for key in ("hf_se cret", "hf_se\ncret", "hf_s\u00e9cret"):
        error = error_of(run(script, *given, "--api_key", key, cwd=tmp_path))
        assert error.startswith("error: --api_key: it is empty, or holds a character that no key has")
        assert "cret" not in error
    assert "no terminal to ask" in error_of(run(script, *given, "--api_key", cwd=tmp_path))


def test_tokenizers(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.connect(monkeypatch, tmp_path)
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "tokenizer.model").write_bytes(b"llama 2")
    server.add("meta-llama/Llama-2-7b", tmp_path / "repository", kind="model")
    assert download_tokenizer("llama2", tmp_path / "out") == [tmp_path / "out" / "tokenizer.model"]
    with pytest.raises(UserError, match="there is no model 'google/gemma-2-2b'"):
        download_tokenizer("gemma", tmp_path / "out")
    with pytest.raises(UserError, match=r"known are llama2, .*did you mean 'llama3'"):
        download_tokenizer("llama-3", tmp_path / "out")
    (tmp_path / "repository" / "tokenizer.model").rename(tmp_path / "repository" / "other.model")
    server.add("google/gemma-2-2b", tmp_path / "repository", kind="model")
    with pytest.raises(UserError, match=r"has no file 'tokenizer\.model'; it has other\.model"):
        download_tokenizer("gemma", tmp_path / "out")


def test_tiktoken(server: HubServer, tmp_path: Path) -> None:
    data = b"IQ== 0\n"
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "cl100k_base.tiktoken").write_bytes(data)
    server.add("some/files", tmp_path / "files", kind="model")
    url = f"{server.url}/some/files/resolve/main/cl100k_base.tiktoken"
    with pytest.raises(UserError, match="gave other bytes than were published"):
        download_tokenizer("tiktoken", tmp_path / "out", url=url)
    assert not (tmp_path / "out").exists()
    sha256 = hashlib.sha256(data).hexdigest()
    assert sha256 != TIKTOKEN_SHA256
    (file,) = download_tokenizer("tiktoken", tmp_path / "out", url=url, sha256=sha256)
    assert file == tmp_path / "out" / "cl100k_base.tiktoken"
    assert file.read_bytes() == data
    done = run("download_tokenizer.py", "tiktoken", "out", "--tiktoken_url", f"{url}.not", cwd=tmp_path)
    assert "cannot be downloaded: HTTP Error 404" in error_of(done)


def packages(cache: Path) -> dict[str, str]:
    """Unpacked packages of the category 'prose', as the cache keeps them; returns their texts by source."""
    gcide = "gcide " * 4000  # cut after 16384 bytes
    foldoc = "foldoc entry " * 20
    anarchism = "a page of text " * 20
    novel = ["It is a truth universally acknowledged, that a single man", "in possession of a good fortune"] * 5
    for path, data in {
        "dict-gcide/usr/gcide.dict.dz": gzip.compress(gcide.encode()),
        "dict-foldoc/usr/foldoc.dict.dz": gzip.compress(foldoc.encode()),
        "anarchism/usr/html/a.html": f"<head>no</head><p>{anarchism}</p><script>no</script>".encode(),
        "anarchism/usr/html/same.html": f"<p>{anarchism}</p>".encode(),
        "anarchism/usr/html/short.html": b"<p>short</p>",
        "r-cran-janeaustenr/usr/Rdata.rdb": stored_by_r(novel),
    }.items():
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_bytes(data)
    return {"gcide": gcide, "foldoc": foldoc, "anarchism": anarchism.strip(), "austen": "\n".join(novel)}


def stored_by_r(lines: list[str]) -> bytes:
    strings = b"".join(b"\0\x04\0\x09" + len(line).to_bytes(4, "big") + line.encode() for line in lines)
    return len(strings).to_bytes(4, "big") + zlib.compress(strings)


def test_build_corpus(tmp_path: Path) -> None:
    whole = packages(tmp_path / "cache")
    arguments = ["out", "--only", "prose", "--cache", "cache"]
    assert run("build_corpus.py", *arguments, cwd=tmp_path).returncode == 0
    written = b"".join((tmp_path / "out" / f"{split}.jsonl").read_bytes() for split in ("train", "valid"))
    rows = [json.loads(line) for line in written.splitlines() if line]
    texts: dict[str, list[str]] = {}
    for row in rows:
        assert row["id"] == hashlib.sha1(row["text"].encode()).hexdigest()[:16]
        assert row["category"] == "prose"
        texts.setdefault(row["source"], []).append(row["text"])
    assert sorted(texts.pop("gcide"), key=len, reverse=True) == [whole["gcide"][:16384], whole["gcide"][16384:]]
    assert texts == {source: [text] for source, text in whole.items() if source != "gcide"}

    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    assert run("build_corpus.py", *arguments, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before


def test_only_permissive_licences(corpus: Any, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    whole = packages(cache)
    for name in ("dict-devil", "dict-jargon"):
        (cache / name).mkdir()
        (cache / name / "a.dict.dz").write_bytes(gzip.compress(f"{name} entry ".encode() * 20))
    book = "<chapter n='1'/><p>In the beginning &amp; <note>a footnote</note>later,\n  a verse.</p>" * 9
    packed = zlib.compress(book.encode())
    module = cache / "sword-text-web" / "web"
    module.mkdir(parents=True)
    (module / "ot.bzz").write_bytes(b"--" + packed)
    (module / "ot.bzs").write_bytes(struct.pack("<III", 2, len(packed), len(book)))
    corpus.build(out, {"prose"}, cache, permissive=True)
    rows = [json.loads(line) for file in sorted(out.iterdir()) for line in file.read_text().splitlines() if line]
    texts = {row["source"]: row["text"] for row in rows}
    assert texts == {
        "austen": whole["austen"],
        "devils-dictionary": "dict-devil entry " * 20,
        "jargon-file": "dict-jargon entry " * 20,
        "world-english-bible": "\n".join(["In the beginning & later,\na verse."] * 9),
    }
    assert {row["licence"] for row in rows} == {"public domain"}
    every = {name for name, *_ in [*corpus.SOURCES, *corpus.PERMISSIVE]} | corpus.BIBLES.keys()
    copyleft = {"gcide", "foldoc", "anarchism"}
    assert copyleft.isdisjoint(corpus.LICENCES)
    assert copyleft < every


def test_build_corpus_without_debian_or_network(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = ["out", "--only", "prose", "--cache", "cache"]
    done = run("build_corpus.py", *arguments, cwd=tmp_path, environment={"PATH": str(empty)})
    assert "apt-get is missing" in error_of(done)
    failing = tmp_path / "failing" / "apt-get"
    failing.parent.mkdir()
    failing.write_text("#!/bin/sh\necho 'E: Failed to fetch: no route to host' >&2\nexit 100\n")
    failing.chmod(0o755)
    path = f"{failing.parent}:{os.environ['PATH']}"
    done = run("build_corpus.py", *arguments, cwd=tmp_path, environment={"PATH": path})
    assert "'dict-gcide' of Debian 12 (E: Failed to fetch: no route to host); check the network" in error_of(done)
    assert "'poems' is unknown" in error_of(run("build_corpus.py", "out", "--only", "poems", cwd=tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with sources of prose alone, and a speedrun of few documents."""
    spec = importlib.util.spec_from_file_location("build_corpus", SETUP / "build_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prose = [source for source in module.SOURCES if source[1] == "prose"]
    monkeypatch.setattr(module, "SOURCES", prose)
    monkeypatch.setattr(speedrun_text, "SOURCES", dict.fromkeys([name for name, *_ in prose] + ["austen"], "0" * 16))
    monkeypatch.setattr(speedrun_text, "CUTS", {"train.jsonl": 2, "tune.jsonl": 1})
    return module


def test_the_text_of_the_speedrun(corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every, cache, out = set(corpus.CATEGORIES), tmp_path / "cache", tmp_path / "out"
    packages(cache)
    corpus.build(tmp_path / "whole", every, cache, with_kernel=False)
    for name in ("dict-gcide", "dict-foldoc", "anarchism", "r-cran-janeaustenr"):
        (cache / name).rename(cache / f"{name}={speedrun_text.PACKAGES[name]}")
    with pytest.raises(UserError, match=r"\(train.*, tune.*, valid.jsonl\).*: gcide, foldoc, anarchism, austen dif"):
        corpus.build(out, every, cache, with_kernel=False, speedrun=True)
    written = {name: (out / name).read_bytes() for name in speedrun_text.PARTS}
    lines = (tmp_path / "whole" / "train.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    assert written["train.jsonl"] == b"".join(lines[:2])
    assert written["tune.jsonl"] == lines[2]
    assert written["valid.jsonl"] == (tmp_path / "whole" / "valid.jsonl").read_bytes()

    digests = {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}
    monkeypatch.setattr(speedrun_text, "PARTS", digests)
    corpus.build(out, every, cache, with_kernel=False, speedrun=True)
    hashes = b"".join(b"%s" % hashlib.sha1(text.encode()).hexdigest().encode() for text in ["foldoc entry " * 20])
    monkeypatch.setitem(speedrun_text.SOURCES, "foldoc", hashlib.sha256(hashes).hexdigest()[:16])
    monkeypatch.setattr(speedrun_text, "PARTS", {**digests, "tune.jsonl": "0"})
    with pytest.raises(UserError, match=r"\(tune.jsonl\).*: gcide, anarchism, austen differ"):
        corpus.build(out, every, cache, with_kernel=False, speedrun=True)


def test_packages_of_the_speedrun_have_their_versions(
    corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "apt-get": 'echo "$@" >> {log}; case "$@" in *update) ;; *) touch dict-foldoc_1_all.deb;; esac',
        "dpkg-deb": "mkdir files; touch files/inside",
    }
    for name, program in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program.format(log=tmp_path / 'log')}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    versions = {"dict-foldoc": "1:2-3"}
    for snapshot in (False, True):
        cache = tmp_path / f"cache-{snapshot}"
        cache.mkdir()
        for _ in range(2):  # the second time from the cache
            folder = corpus.Packages(cache, versions, snapshot).folder("dict-foldoc")
            assert [file.name for file in folder.iterdir()] == ["inside"]
    plain, update, download = (tmp_path / "log").read_text().splitlines()
    assert plain.endswith("-o APT::Architectures=amd64 download dict-foldoc=1:2-3")
    assert update.endswith(" update")
    assert download.endswith(" download dict-foldoc=1:2-3")
    place = tmp_path / "cache-True" / "snapshot"
    for line in (update, download):
        assert (
            f"Dir::Etc::sourcelist={place}/sources.list -o Dir::Etc::sourceparts=- -o Dir::State::lists={place}" in line
        )
    assert (place / "sources.list").read_text().splitlines() == speedrun_text.SNAPSHOT


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--speedrun", "--only", "prose"], "--speedrun: its text is of all categories and without the kernel"),
        (["--permissive", "--kernel"], "--permissive: the kernel and the text of the speedrun hold other licences"),
        (["--snapshot"], "--snapshot: it is for the versions of --speedrun"),
    ],
)
def test_options_of_the_speedrun_that_do_not_go_together(arguments: list[str], shown: str, tmp_path: Path) -> None:
    assert shown in error_of(run("build_corpus.py", "out", *arguments, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []
