"""`packed_attention` by cuDNN's graphs. Importing this needs the package nvidia-cudnn-frontend.

A graph is made once for a shape, and no shape asks for the exact number of positions, so that streams of about the same
size share one: cuDNN reads and writes only what lies in an entry. Rows in none would be left as they are.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import cudnn  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from bytelatent.kernels.packed_attention import HALVES, Heads

# Shapes: T positions in the stream, B entries, H heads, J key/value heads, E head size

ROUNDED = 2048  # a graph's positions are a multiple of this


@dataclass(frozen=True)
class Shape:
    """What a graph is made for: [B, H, S, E] of which each entry has a length of its own, end to end."""

    device: torch.device
    size: int  # S, no document is longer; nor are all of them together
    entries: int
    heads: Heads
    window: int | None

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers a position: of queries, of keys, and of logarithms."""
        heads = self.heads
        return heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim, heads.num_heads


@dataclass(frozen=True)
class Graph:
    shape: Shape
    graph: Any
    numbers: dict[str, int]  # how cuDNN calls each tensor
    workspace: int  # bytes

    def run(self, begin: Tensor, length: Tensor, **tensors: Tensor) -> None:
        """Read and write contiguous tensors."""
        given = {**tensors, "length": length, **{_first(m): begin * m for m in set(self.shape.multiples)}}
        handle = _handle(self.shape.device)
        cudnn.set_stream(handle, torch.cuda.current_stream(self.shape.device).cuda_stream)
        workspace = torch.empty(max(self.workspace, 1), dtype=torch.uint8, device=self.shape.device)
        with torch.cuda.device(self.shape.device):
            self.graph.execute({number: given[name] for name, number in self.numbers.items()}, workspace, handle=handle)


def make(device: torch.device, size: int, entries: int, heads: Heads, window: int | None) -> None:
    """Make the graphs, which takes a second for the first ones.

    Raises:
        RuntimeError: there is none for this device or these shapes.
    """
    shape = _shape(device, size, entries, heads, window)
    try:
        _forward(shape)
        _backward(shape)
    except cudnn.cudnnGraphNotSupportedError as error:
        raise RuntimeError(str(error)) from error


def attention(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, length: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    out_THE = torch.empty_like(q_THE)
    logsum_TH = q_THE.new_empty(q_THE.shape[:2], dtype=torch.float32)
    graph = _forward(_shape_of(q_THE, k_TJE, length, window))
    graph.run(begin, length, q=q_THE, k=k_TJE, v=v_TJE, out=out_THE, logsum=logsum_TH)
    return out_THE, logsum_TH


def attention_backward(
    d_out: Tensor,
    q_THE: Tensor,
    k_TJE: Tensor,
    v_TJE: Tensor,
    begin: Tensor,
    length: Tensor,
    window: int | None,
    out_THE: Tensor,
    logsum_TH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q_THE, k_TJE, v_TJE))
    graph = _backward(_shape_of(q_THE, k_TJE, length, window))
    inputs = {"q": q_THE, "k": k_TJE, "v": v_TJE, "out": out_THE, "logsum": logsum_TH, "d_out": d_out}
    graph.run(begin, length, **inputs, d_q=d_q, d_k=d_k, d_v=d_v)
    return d_q, d_k, d_v


def _shape_of(q_THE: Tensor, k_TJE: Tensor, length: Tensor, window: int | None) -> Shape:
    assert q_THE.dtype in HALVES, f"cuDNN computes attention in bfloat16 and float16, not in {q_THE.dtype}"
    size, num_heads, head_dim = q_THE.shape
    return _shape(q_THE.device, size, length.shape[0], Heads(q_THE.dtype, num_heads, k_TJE.shape[1], head_dim), window)


def _shape(device: torch.device, size: int, entries: int, heads: Heads, window: int | None) -> Shape:
    size = -(-size // ROUNDED) * ROUNDED
    return Shape(device, size, entries, heads, window if window is not None and window < size else None)


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def _forward(shape: Shape) -> Graph:
    made = _Making(shape)
    q, k, v = made.queries("q"), made.keys("k"), made.keys("v")
    out, logsum = made.graph.sdpa(name="attention", q=q, k=k, v=v, generate_stats=True, **made.mask)
    made.give("out", out, made.queries_laid)
    made.give("logsum", logsum, made.logsums_laid)
    return made.done()


@cache
def _backward(shape: Shape) -> Graph:
    made = _Making(shape)
    given = {"q": made.queries("q"), "k": made.keys("k"), "v": made.keys("v"), "o": made.queries("out")}
    given |= {"dO": made.queries("d_out"), "stats": made.tensor("logsum", made.logsums_laid)}
    d_q, d_k, d_v = made.graph.sdpa_backward(name="attention_backward", **given, **made.mask)
    made.give("d_q", d_q, made.queries_laid)
    made.give("d_k", d_k, made.keys_laid)
    made.give("d_v", d_v, made.keys_laid)
    return made.done()


@dataclass(frozen=True)
class _Laid:
    """How a tensor lies in memory."""

    dtype: Any
    heads: int
    width: int

    @property
    def multiple(self) -> int:
        return self.heads * self.width


class _Making:
    """A graph in the making."""

    def __init__(self, shape: Shape):
        self.shape = shape
        kinds, heads = cudnn.data_type, shape.heads
        kind = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[heads.dtype]
        self.queries_laid = _Laid(kind, heads.num_heads, heads.head_dim)
        self.keys_laid = _Laid(kind, heads.num_kv_heads, heads.head_dim)
        self.logsums_laid = _Laid(kinds.FLOAT, heads.num_heads, 1)
        self.graph = cudnn.pygraph(
            io_data_type=kind,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=_handle(shape.device),
        )
        self.tensors: dict[str, Any] = {}
        for multiple in set(shape.multiples):
            self._column(_first(multiple), shape.entries + 1, kinds.INT64)
        length = self._column("length", shape.entries, kinds.INT32)
        self.mask: dict[str, Any] = {
            "attn_scale": heads.head_dim**-0.5,
            "use_padding_mask": True,  # entries have lengths
            "seq_len_q": length,
            "seq_len_kv": length,
            "max_total_seq_len_q": shape.size,
            "max_total_seq_len_kv": shape.size,
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }
        if shape.window is not None:
            self.mask["diagonal_band_left_bound"] = shape.window

    def queries(self, name: str) -> Any:
        return self.tensor(name, self.queries_laid)

    def keys(self, name: str) -> Any:
        return self.tensor(name, self.keys_laid)

    def tensor(self, name: str, laid: _Laid) -> Any:
        """What is given."""
        dim, stride = self._extent(laid)
        first = self.tensors[_first(laid.multiple)]
        made = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=laid.dtype, ragged_offset=first)
        self.tensors[name] = made
        return made

    def give(self, name: str, tensor: Any, laid: _Laid) -> None:
        """What the graph gives back."""
        dim, stride = self._extent(laid)
        tensor.set_output(True).set_data_type(laid.dtype).set_dim(dim).set_stride(stride)
        tensor.set_ragged_offset(self.tensors[_first(laid.multiple)])
        self.tensors[name] = tensor

    def done(self) -> Graph:
        with torch.cuda.device(self.shape.device):
            self.graph.validate()
            self.graph.build_operation_graph()
            self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            self.graph.check_support()
            self.graph.build_plans()
        numbers = {name: tensor.get_uid() for name, tensor in self.tensors.items()}
        return Graph(self.shape, self.graph, numbers, self.graph.get_workspace_size())

    def _column(self, name: str, size: int, dtype: Any) -> Any:
        made = self.graph.tensor(name=name, dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=dtype)
        self.tensors[name] = made
        return made

    def _extent(self, laid: _Laid) -> tuple[list[int], list[int]]:
        size = self.shape.size
        dim = [self.shape.entries, laid.heads, size, laid.width]
        return dim, [size * laid.multiple, laid.width, laid.multiple, 1]


def _first(multiple: int) -> str:
    """The name of where entries begin, counted in so many numbers a position."""
    return f"first_{multiple}"
