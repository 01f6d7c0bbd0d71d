"""Tensors on disk against torch and the safetensors library, in chunks smaller than a tensor."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.weights import safetensors_io as tensors
from bytelatent.weights.safetensors_io import (
    DTYPES,
    StoredTensor,
    listed,
    read_json_object,
    read_pickle,
    read_safetensors,
    read_weights,
    shown,
    write_safetensors,
    write_weights,
)

SIZES = st.lists(st.integers(0, 5), max_size=3)
TYPES = st.sampled_from(list(DTYPES.values()))


def random(dtype: torch.dtype, shape: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


@pytest.fixture(params=[1, 3, 16, 1 << 26], autouse=True)
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", request.param)
    return request.param


@given(described=st.dictionaries(st.text(min_size=1, max_size=9), st.tuples(TYPES, SIZES), max_size=6))
def test_files_are_those_of_the_library(
    described: dict[str, tuple[torch.dtype, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    described.pop("__metadata__", None)
    folder = tmp_path_factory.mktemp("a")
    values = {name: random(dtype, shape, n) for n, (name, (dtype, shape)) in enumerate(described.items())}
    written: list[int] = []
    write_safetensors(folder / "ours.safetensors", {n: StoredTensor.of(t) for n, t in values.items()}, written.append)
    save_file(values, folder / "theirs.safetensors", metadata={"format": "pt"})
    assert sum(written) == sum(t.numel() * t.element_size() for t in values.values())
    theirs = load_file(folder / "ours.safetensors")
    ours = {name: found.load() for name, found in read_safetensors(folder / "theirs.safetensors").items()}
    assert values.keys() == theirs.keys() == ours.keys()
    for name, value in values.items():
        assert same(theirs[name], value)
        assert same(ours[name], value)


@given(
    dtype=TYPES,
    inner=st.lists(st.integers(0, 3), max_size=2),
    rows=st.integers(1, 4),
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    on_disk=st.booleans(),
)
def test_join_and_split_are_those_of_torch(
    dtype: torch.dtype,
    inner: list[int],
    rows: int,
    counts: list[int],
    on_disk: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Cut where the pieces do not end, of pieces without rows, of rows without numbers."""
    parts = [random(dtype, [rows * count, *inner], seed) for seed, count in enumerate(counts)]
    stored = [StoredTensor.of(part) for part in parts]
    if on_disk:
        file = tmp_path_factory.mktemp("a") / "a.safetensors"
        save_file({str(n): part for n, part in enumerate(parts)}, file)
        stored = [read_safetensors(file)[str(n)] for n in range(len(parts))]
    whole = StoredTensor.join(stored)
    assert same(whole.load(), torch.cat(parts))
    assert whole.num_bytes == sum(part.numel() * part.element_size() for part in parts)
    pieces = whole.split(rows)
    expected = torch.cat(parts).split(rows) if sum(counts) else ()
    assert len(pieces) == len(expected)
    assert all(same(piece.load(), part) for piece, part in zip(pieces, expected, strict=True))
    if pieces:
        assert same(StoredTensor.join(pieces).load(), torch.cat(parts))


def test_chunks_are_small(chunk_bytes: int, tmp_path: Path) -> None:
    tensor = random(torch.float32, [7, 5])
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    for stored in (StoredTensor.of(tensor), read_safetensors(tmp_path / "a.safetensors")["a"]):
        sizes = [memoryview(chunk).nbytes for chunk in stored.chunks()]
        assert max(sizes) <= max(chunk_bytes, 4)
        assert sum(sizes) == 140


@pytest.mark.parametrize("view", [lambda t: t.T, lambda t: t[:, 1:3], lambda t: t[::2], lambda t: t[0].expand(3, 4)])
def test_views(view: object, tmp_path: Path) -> None:
    tensor = view(random(torch.bfloat16, [5, 4]))  # type: ignore[operator]
    write_safetensors(tmp_path / "a.safetensors", {"a": StoredTensor.of(tensor)}, lambda n: None)
    assert same(load_file(tmp_path / "a.safetensors")["a"], tensor.contiguous())
    torch.save({"a": tensor}, tmp_path / "a.pth")
    assert same(read_pickle(tmp_path / "a.pth")["a"].load(), tensor.contiguous())


@pytest.mark.parametrize(("limit", "num_files"), [(None, 1), (48, 1), (47, 2), (16, 3), (1, 4), (0, 4)])
def test_shards(limit: int | None, num_files: int, tmp_path: Path) -> None:
    values = {name: torch.full([size], float(size)) for name, size in (("d", 1), ("a", 3), ("c", 4), ("b", 4))}
    write_weights(tmp_path, {name: StoredTensor.of(value) for name, value in values.items()}, limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    assert all(same(found.load(), values[name]) for name, found in read_weights(tmp_path).items())
    if num_files == 1:
        assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 48
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert [file.name for file in files] == [
        f"model-0000{n}-of-0000{num_files}.safetensors" for n in range(1, num_files + 1)
    ]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    tensor = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(UserError, match=r"a is torch.complex64, which is not supported"):
        write_safetensors(tmp_path / "a.safetensors", {"a": StoredTensor.of(tensor)}, lambda n: None)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    stored = read_safetensors(tmp_path / "a.safetensors")["a"]
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match="became shorter while it was read"):
        stored.load()
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        stored.load()


@pytest.mark.parametrize(
    "text",
    [b"", b"[1]", b"null", b"{", b"\xff{}", b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"[" * 99_999, b'"\x1b[2J'],
)
def test_what_is_no_json_object(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=r"a.json' (is not valid JSON|holds no JSON object)") as caught:
        read_json_object(tmp_path / "a.json")
    assert str(caught.value).isprintable()


def test_names_that_are_shown() -> None:
    assert shown("plain") == "plain"
    assert shown("\x1b[2Jred\n\t\u202e") == " [2Jred   "
    assert shown("x" * 300) == "x" * 200 + "..."
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(n) for n in range(14)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, and 2 more"
