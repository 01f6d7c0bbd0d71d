"""Attention of packed documents: the operator against a mask that is written out, cuDNN's graphs against what they say,
and who is asked for it when."""

import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, library

from bytelatent.kernels import packed_attention as module
from bytelatent.kernels.packed_attention import (
    Heads,
    cudnn_computes,
    entries_for,
    entries_of,
    plain_packed_attention,
)
from bytelatent.kernels.rotary import rotary_embedding
from bytelatent.model import attention
from bytelatent.model.attention import DenseMask, FlexMask, PackedMask, build_mask, packed_mask
from bytelatent.model.block import Block, Stack
from bytelatent.model.settings import StackSettings
from tests.kernels import cudnn_stand_in

BF16 = torch.bfloat16
CUDA = torch.device("cuda", 0)
SIZES = [7, 1, 1, 12, 3]
WINDOWS = [None, 1, 3, 100]


def documents(sizes: list[int], padding: int) -> Tensor:
    numbers = torch.tensor([*range(len(sizes)), -1])
    return numbers.repeat_interleave(torch.tensor([*sizes, padding]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=80), st.integers(0, 5))
@example([1] * 63, 1)
@example([1] * 64, 1)
def test_entries_are_the_documents_and_the_padding(sizes: list[int], padding: int) -> None:
    entries = entries_for(len(sizes))
    begin, length = entries_of(documents(sizes, padding), entries)
    assert entries >= max(64, len(sizes) + 1)
    assert entries in (64, 128)
    runs = [*sizes, padding]
    expected = [sum(runs[:number]) for number in range(len(runs) + 1)]
    assert begin.tolist() == expected + [sum(runs)] * (entries - len(runs))
    assert length.tolist() == runs + [0] * (entries - len(runs))
    assert length.dtype == torch.int32


@pytest.mark.parametrize("padding", [0, 1, 6])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_equals_a_dense_mask(kv_heads: int, window: int | None, padding: int) -> None:
    document = documents(SIZES, padding)
    random = torch.Generator().manual_seed(padding)
    q, k, v, d_out = (torch.randn(len(document), heads, 8, generator=random) for heads in (4, kv_heads, kv_heads, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dense, mask = build_mask(document, window), packed_mask(document, window, len(SIZES))
    assert isinstance(dense, DenseMask) or window == 1 or window == 3
    expected = dense.attend(q, k, v)
    gradients = torch.autograd.grad(expected, leaves, d_out)
    for out in (mask.attend(q, k, v), plain_packed_attention(q, k, v, mask.begin, mask.length, window)[0]):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        found = torch.autograd.grad(out, leaves, d_out)
        for ours, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_it_is_a_well_made_operator(dtype: torch.dtype) -> None:
    begin, length = entries_of(documents(SIZES, 2), 64)
    q, k, v = torch.randn(3, 2, 26, 16, dtype=dtype).transpose(1, 2)  # not contiguous
    library.opcheck(
        module.packed_attention_operator, (*(x.detach().requires_grad_() for x in (q, k, v)), begin, length, 5)
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_block_compiles_whole_and_once(dtype: torch.dtype) -> None:
    """With the operator in it; another number of documents, and of entries, is the same program."""
    torch.manual_seed(0)
    block = Block(StackSettings(dim=32, num_layers=1, num_heads=2, num_kv_heads=1, multiple_of=8, window=5))
    torch._dynamo.reset()
    programs = []

    def backend(graph: Any, inputs: Any) -> Any:
        programs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for sizes in ([9, 1, 90], [1] * 70 + [30], [100]):
        document = documents(sizes, 4)
        rotary = rotary_embedding(torch.arange(104), 16, 1e4)
        found = []
        for run, mask in ((block, build_mask(document, 5)), (compiled, packed_mask(document, 5, len(sizes)))):
            x = torch.randn(104, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
            with torch.autocast("cpu", BF16, enabled=dtype == BF16):
                out = run(x, rotary, mask)
            found.append((out, torch.autograd.grad(out.square().sum(), [x, *block.parameters()])))
        off = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found[0][0], found[1][0], atol=off, rtol=off)
        for one, other in zip(found[0][1], found[1][1], strict=True):
            assert float((one - other).norm() / one.norm()) < off
    assert len(programs) == 1
    torch._dynamo.reset()


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for cuDNN."""
    monkeypatch.setitem(sys.modules, "cudnn", cudnn_stand_in.cudnn())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    yield
    module._graph.cache_clear()
    module._handle.cache_clear()


@pytest.mark.usefixtures("cudnn")
def test_threads_keep_their_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a handle, which has one stream: that of the thread that runs a graph."""
    streams: list[int] = []
    ran_on: list[tuple[int, int]] = []

    def set_stream(handle: object, stream: int) -> None:
        streams.append(stream)
        time.sleep(2e-3)  # time for the other thread

    def execute(self: object, *_: object, **__: object) -> None:
        ran_on.append((streams[-1], threading.get_ident()))

    monkeypatch.setattr(sys.modules["cudnn"], "set_stream", set_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=threading.get_ident()))
    monkeypatch.setattr(cudnn_stand_in.Graph, "execute", execute)
    begin, length = entries_of(documents(SIZES, 6), 64)
    q, k, v = (torch.randn(30, 4, 16).to(BF16) for _ in range(3))
    module.cudnn_attention(q, k, v, begin, length, None)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: module.cudnn_attention(q, k, v, begin, length, None), range(20)))
    assert len({thread for _, thread in ran_on}) == 3
    assert all(stream == thread for stream, thread in ran_on)


@pytest.mark.parametrize("window", [None, 5, 4096])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.usefixtures("cudnn")
def test_what_the_graphs_describe(dtype: torch.dtype, kv_heads: int, window: int | None) -> None:
    """They read and write each document where it lies."""
    begin, length = entries_of(documents(SIZES, 6), 64)
    q, k, v, d_out = (torch.randn(30, heads, 16).to(dtype) for heads in (4, kv_heads, kv_heads, 4))
    out, logsum = module.cudnn_attention(q, k, v, begin, length, window)
    expected, sums = plain_packed_attention(q, k, v, begin, length, window)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(logsum, sums, atol=1e-5, rtol=1e-5)
    gradients = module.cudnn_attention_backward(d_out, q, k, v, begin, length, window, out, logsum)
    plain = module.plain_packed_attention_backward(d_out, q, k, v, begin, length, window, out, logsum)
    for ours, theirs in zip(gradients, plain, strict=True):
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 1e-2
    assert module._graph.cache_info().misses == 2
    for size in (31, 2048):  # a graph is for about as many positions
        module.make_graphs(q.device, size, 64, Heads(dtype, 4, kv_heads, 16), window)
    assert module._graph.cache_info().misses == 2
    module.make_graphs(q.device, 2049, 64, Heads(dtype, 4, kv_heads, 16), window)
    assert module._graph.cache_info().misses == 4
    with pytest.raises(AssertionError, match="in bfloat16 and float16, not in"):
        module.cudnn_attention(q.float(), k.float(), v.float(), begin, length, window)


@pytest.mark.usefixtures("cudnn")
def test_a_graph_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise NotImplementedError("no engine")  # the stand-in's cudnnGraphNotSupportedError

    monkeypatch.setattr(cudnn_stand_in.Graph, "check_support", none)
    with pytest.raises(RuntimeError, match="no engine"):
        module.make_graphs(torch.device("cpu"), 10, 64, heads(), None)


# Who is asked


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """As if there were one, with cuDNN; the shapes for which graphs were made."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "make_graphs", lambda *given: made.append(given))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(module, "cudnn_is_installed", lambda: True)
    module._has_graphs.cache_clear()
    yield made
    module._has_graphs.cache_clear()


def heads(dtype: torch.dtype = BF16, head_dim: int = 64) -> Heads:
    return Heads(dtype, 4, 2, head_dim)


def test_what_cudnn_takes(hopper: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert cudnn_computes(CUDA, 16384, 60, heads(), 512)
    assert hopper == [(CUDA, 16384, 64, heads(), 512)]
    assert cudnn_computes(CUDA, 16384, 255, heads(torch.float16, 128), None)
    assert not cudnn_computes(CUDA, 16384, 256, heads(), None)  # 512 entries: less than 64 positions each
    assert cudnn_computes(CUDA, 2048, 63, heads(), None)
    assert not cudnn_computes(CUDA, 2048, 64, heads(), None)
    assert not cudnn_computes(CUDA, 16384, 3, heads(torch.float32), None)
    assert not cudnn_computes(CUDA, 16384, 3, heads(head_dim=144), None)
    assert not cudnn_computes(CUDA, 16384, 3, heads(head_dim=24), None)
    torch.use_deterministic_algorithms(True)
    try:
        assert not cudnn_computes(CUDA, 16384, 3, heads(), None)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(module, "cudnn_is_installed", lambda: False)
    assert not cudnn_computes(CUDA, 16384, 3, heads(), None)
    monkeypatch.setattr(module, "cudnn_is_installed", lambda: True)
    for capability, taken in {(8, 9): False, (9, 0): True, (10, 0): True, (12, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert cudnn_computes(CUDA, 16384, 3, heads(), None) == taken


@pytest.mark.usefixtures("hopper")
def test_what_cudnn_has_no_graph_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any) -> None:
        raise RuntimeError("no engine")

    monkeypatch.setattr(module, "make_graphs", make)
    with pytest.warns(UserWarning, match="cuDNN does not compute attention on H100, FlexAttention does: no engine"):
        assert not cudnn_computes(CUDA, 16384, 3, heads(), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning comes once
        assert not cudnn_computes(CUDA, 16384, 3, heads(), None)


def test_installed_where_it_finds_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> int:
        raise RuntimeError("Unable to find symbol cudnnGetVersion")

    for found, expected in ((lambda: 91900, True), (lambda: 90700, False), (none, False)):
        monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=found))
        assert module.cudnn_is_installed.__wrapped__() is expected
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert module.cudnn_is_installed.__wrapped__() is False


@pytest.mark.usefixtures("hopper")
def test_the_mask_of_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a stream on CUDA."""
    shape: dict[str, Any] = {"dim": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "multiple_of": 8}
    stack, seen = Stack(StackSettings(**shape, window=300)), []
    document: Any = SimpleNamespace(device=CUDA, shape=(10_000,))
    monkeypatch.setattr(attention, "_flex_mask", lambda *given: FlexMask(*given))
    monkeypatch.setattr(attention, "packed_mask", lambda *given: PackedMask(*given))
    monkeypatch.setattr(module, "cudnn_computes", lambda *given: seen.append(given) or cudnn_computes(*given))
    flex, packed = FlexMask(document, 300), PackedMask(document, 300, 70)  # what they are given
    assert stack.mask(document, 70) == flex  # float32
    stack.to(BF16)
    assert stack.mask(document, 70) == packed
    assert stack.mask(document, None) == flex
    assert stack.mask(document, 10_000) == flex
    assert build_mask(document, 300) == flex
    stack.to(torch.float32)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda on: on == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda on: {"cuda": BF16}[on])
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda on: True)
    assert stack.mask(document, 70) == packed
    assert seen[1] == (CUDA, 10_000, 70, Heads(BF16, 2, 1, 32), 300)
