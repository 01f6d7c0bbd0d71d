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

# Shapes: T positions in the stream, B entries, H heads, J key/value heads, E head size

ROUNDED = 2048  # a graph's positions are a multiple of this
KINDS = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}


@dataclass(frozen=True)
class GraphShape:
    """What a graph is made for: [B, H, S, E] of which each entry has a length of its own, end to end."""

    device: torch.device
    size: int  # S, no document is longer; nor are all of them together
    entries: int
    window: int | None
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def multiples(self) -> tuple[int, int, int]:
        """Numbers a position: of queries, of keys, and of logarithms."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_heads


@dataclass(frozen=True)
class CudnnGraph:
    shape: GraphShape
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


def make_graphs(device: torch.device, size: int, entries: int, window: int | None, *heads: Any) -> None:
    """Make the graphs, which takes a second for the first ones.

    Args:
        heads: dtype, H, J and E.

    Raises:
        RuntimeError: there is none for this device or these shapes.
    """
    shape = _shape(device, size, entries, window, *heads)
    try:
        _forward(shape)
        _backward(shape)
    except cudnn.cudnnGraphNotSupportedError as error:
        raise RuntimeError(str(error)) from error


def cudnn_attention(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, length: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    out_THE = torch.empty_like(q_THE)
    logsum_TH = q_THE.new_empty(q_THE.shape[:2], dtype=torch.float32)
    graph = _forward(_shape_of(q_THE, k_TJE, length, window))
    graph.run(begin, length, q=q_THE, k=k_TJE, v=v_TJE, out=out_THE, logsum=logsum_TH)
    return out_THE, logsum_TH


def cudnn_attention_backward(
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


def _shape_of(q_THE: Tensor, k_TJE: Tensor, length: Tensor, window: int | None) -> GraphShape:
    assert q_THE.dtype in KINDS, f"cuDNN computes attention in bfloat16 and float16, not in {q_THE.dtype}"
    size, num_heads, head_dim = q_THE.shape
    return _shape(q_THE.device, size, length.shape[0], window, q_THE.dtype, num_heads, k_TJE.shape[1], head_dim)


def _shape(device: torch.device, size: int, entries: int, window: int | None, *heads: Any) -> GraphShape:
    size = -(-size // ROUNDED) * ROUNDED
    return GraphShape(device, size, entries, window if window is not None and window < size else None, *heads)


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def _forward(shape: GraphShape) -> CudnnGraph:
    builder = _GraphBuilder(shape)
    q, k, v = builder.queries("q"), builder.keys("k"), builder.keys("v")
    out, logsum = builder.graph.sdpa(name="attention", q=q, k=k, v=v, generate_stats=True, **builder.mask)
    builder.output("out", out, builder.queries_layout)
    builder.output("logsum", logsum, builder.logsums_layout)
    return builder.build()


@cache
def _backward(shape: GraphShape) -> CudnnGraph:
    builder = _GraphBuilder(shape)
    given = {"q": builder.queries("q"), "k": builder.keys("k"), "v": builder.keys("v"), "o": builder.queries("out")}
    given |= {"dO": builder.queries("d_out"), "stats": builder.tensor("logsum", builder.logsums_layout)}
    d_q, d_k, d_v = builder.graph.sdpa_backward(name="attention_backward", **given, **builder.mask)
    builder.output("d_q", d_q, builder.queries_layout)
    builder.output("d_k", d_k, builder.keys_layout)
    builder.output("d_v", d_v, builder.keys_layout)
    return builder.build()


@dataclass(frozen=True)
class _Layout:
    """A tensor's layout in memory."""

    dtype: Any
    heads: int
    width: int

    @property
    def multiple(self) -> int:
        return self.heads * self.width


class _GraphBuilder:
    """Describes a graph to cuDNN and builds it."""

    def __init__(self, shape: GraphShape):
        self.shape = shape
        kind, kinds = KINDS[shape.dtype], cudnn.data_type
        self.queries_layout = _Layout(kind, shape.num_heads, shape.head_dim)
        self.keys_layout = _Layout(kind, shape.num_kv_heads, shape.head_dim)
        self.logsums_layout = _Layout(kinds.FLOAT, shape.num_heads, 1)
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
            "attn_scale": shape.head_dim**-0.5,
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
        return self.tensor(name, self.queries_layout)

    def keys(self, name: str) -> Any:
        return self.tensor(name, self.keys_layout)

    def tensor(self, name: str, layout: _Layout) -> Any:
        """Declare an input of the graph."""
        dim, stride = self._extent(layout)
        first = self.tensors[_first(layout.multiple)]
        made = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=layout.dtype, ragged_offset=first)
        self.tensors[name] = made
        return made

    def output(self, name: str, tensor: Any, layout: _Layout) -> None:
        """Declare an output of the graph."""
        dim, stride = self._extent(layout)
        tensor.set_output(True).set_data_type(layout.dtype).set_dim(dim).set_stride(stride)
        tensor.set_ragged_offset(self.tensors[_first(layout.multiple)])
        self.tensors[name] = tensor

    def build(self) -> CudnnGraph:
        with torch.cuda.device(self.shape.device):
            self.graph.validate()
            self.graph.build_operation_graph()
            self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            self.graph.check_support()
            self.graph.build_plans()
        numbers = {name: tensor.get_uid() for name, tensor in self.tensors.items()}
        return CudnnGraph(self.shape, self.graph, numbers, self.graph.get_workspace_size())

    def _column(self, name: str, size: int, dtype: Any) -> Any:
        made = self.graph.tensor(name=name, dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=dtype)
        self.tensors[name] = made
        return made

    def _extent(self, layout: _Layout) -> tuple[list[int], list[int]]:
        size = self.shape.size
        dim = [self.shape.entries, layout.heads, size, layout.width]
        return dim, [size * layout.multiple, layout.width, layout.multiple, 1]


def _first(multiple: int) -> str:
    """The name of where entries begin, counted in so many numbers a position."""
    return f"first_{multiple}"
