"""Copies for a save in the background: the same numbers, in memory of their own, that is kept."""

import io
import mmap
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.training.checkpoint.storage import CpuCopies, empty_copies
from bytelatent.training.distributed.ranks import open_ranks
from tests.training.crew import Crew

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


def some(shapes: list[list[int]], dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    pairs = zip(shapes, dtypes, strict=False)
    return {str(number): torch.randint(0, 9, shape).to(dtype) for number, (shape, dtype) in enumerate(pairs)}


@given(SHAPES, st.lists(DTYPES, min_size=6, max_size=6))
def test_copies_are_equal_and_do_not_change_with_the_tensors(
    shapes: list[list[int]], dtypes: list[torch.dtype]
) -> None:
    tensors, mine = some(shapes, dtypes), CpuCopies()
    was = {name: value.clone() for name, value in tensors.items()}
    taken = mine.take(tensors)
    for value in tensors.values():
        value.zero_()
    mine.close()
    assert taken.keys() == was.keys()
    for name, value in taken.items():
        assert value.dtype == was[name].dtype
        assert torch.equal(value, was[name])
        assert value.untyped_storage().nbytes() == value.nbytes, "it would be stored with what lies beside it"


def test_a_stored_copy_is_as_large_as_its_tensor() -> None:
    taken = CpuCopies().take({"a": torch.ones(4), "b": torch.ones(10**6)})
    file = io.BytesIO()
    torch.save(taken["a"], file)
    assert len(file.getvalue()) < 10_000


def test_memory_is_kept_as_long_as_it_fits() -> None:
    mine, first = CpuCopies(), {"a": torch.ones(3, 2), "b": torch.ones(())}
    mine.prepare(first)
    at = {name: value.data_ptr() for name, value in mine.take(first).items()}
    second = {name: value * 2 for name, value in first.items()}
    taken = mine.take(second)
    assert {name: value.data_ptr() for name, value in taken.items()} == at
    assert torch.equal(taken["a"], second["a"])
    other = {"a": torch.zeros(2, 3), "c": torch.zeros(1, dtype=torch.int64)}
    taken = mine.take(other)
    assert taken.keys() == other.keys()
    assert taken["a"].shape == (2, 3)
    assert taken["c"].dtype == torch.int64


def test_a_strided_tensor_is_copied_whole() -> None:
    value = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(CpuCopies().take({"a": value})["a"], value)


class Cudart:
    """What stands for CUDA's runtime: it refuses the second place."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.let_go: list[int] = []

    def cudaHostRegister(self, begin: int, size: int, flags: int) -> int:  # noqa: N802
        self.asked.append((begin, size))
        return 1 if len(self.asked) == 2 else 0

    def cudaHostUnregister(self, begin: int) -> int:  # noqa: N802
        self.let_go.append(begin)
        return 0


def test_each_copy_is_pinned_for_itself_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    tensors = {"a": torch.zeros(5000), "b": torch.zeros(()), "none": torch.zeros(0), "c": torch.zeros(1025).bfloat16()}
    places = empty_copies(tensors)
    mine = CpuCopies()
    mine._pin(list(places.values()), -1)
    assert cudart.asked == [(places[name].data_ptr(), tensors[name].nbytes) for name in "abc"]
    assert all(begin % mmap.PAGESIZE == 0 for begin, _ in cudart.asked), "two may share a page, which is pinned once"
    mine.close()
    assert cudart.let_go == [places[name].data_ptr() for name in "ac"]


def parts_of(_: Any) -> tuple[list[float], list[int], bool]:
    """Of a tensor in parts, what one of two ranks copied."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with open_ranks("cpu", 1):
        mesh = init_device_mesh("cpu", (2,))
        taken: Any = CpuCopies().take({"a": distribute_tensor(torch.arange(5.0), mesh, [Shard(0)])})["a"]
        return taken.to_local().tolist(), list(taken.shape), isinstance(taken, DTensor)


def test_each_rank_copies_its_part(crew: Crew) -> None:
    assert crew.run((2, parts_of, None)) == [[([0.0, 1.0, 2.0], [5], True), ([3.0, 4.0], [5], True)]]
