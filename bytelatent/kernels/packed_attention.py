"""Causal attention inside packed documents, with or without a window, as an operator: with gradients, and whole in a
compiled graph. On CUDA cuDNN computes it, on Hopper faster than FlexAttention; elsewhere it is the plain form.

The stream is given as a batch of a fixed number of entries, one per document; those that are left over are empty.

A graph of cuDNN is made once for a shape, and no shape asks for the exact number of positions, so that streams of about
the same size share one: cuDNN reads and writes only the entries. Rows outside of them are left as they are. It needs
the package nvidia-cudnn-frontend, which is imported where a graph is made or run.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

# Shapes: T positions in the stream, B entries, H heads, J key/value heads, E head size

FEWEST_ENTRIES = 64  # fewer are no faster
POSITIONS = 64  # per entry, at least: with more entries FlexAttention is as fast
HALVES = (torch.bfloat16, torch.float16)
CAPABILITIES = (9, 10)  # Hopper and Blackwell, but not its consumer cards, for which cuDNN takes far more memory
VERSION = 91002  # of cuDNN, 9.10.2: the first that masks packed documents so
GREATEST_HEAD, HEAD_MULTIPLE = 128, 16  # head sizes with which cuDNN's memory grows with T, and not with B times T
SIZE_MULTIPLE = 2048  # a graph's positions are a multiple of this
_USES_HANDLE = Lock()


class Heads(NamedTuple):
    """What attention is computed of."""

    dtype: torch.dtype  # of queries, keys and values
    num_heads: int
    num_kv_heads: int
    head_dim: int


def entries_for(num_documents: int) -> int:
    """Entries for this number of documents and padding: a power of two, so that it seldom changes between batches."""
    return max(FEWEST_ENTRIES, 1 << num_documents.bit_length())


def cudnn_computes(device: torch.device, size: int, num_documents: int, heads: Heads, window: int | None) -> bool:
    """Whether cuDNN computes it here, and is the faster one; its graphs are made then, if they are not yet.

    Args:
        device: on CUDA.
        size: T.
        num_documents: at most, beside padding.
    """
    entries = entries_for(num_documents)
    return (
        heads.dtype in HALVES
        and heads.head_dim <= GREATEST_HEAD
        and heads.head_dim % HEAD_MULTIPLE == 0
        and entries <= max(FEWEST_ENTRIES, size // POSITIONS)
        and not torch.are_deterministic_algorithms_enabled()  # it adds up the queries' gradients in any order
        and torch.cuda.get_device_capability(device)[0] in CAPABILITIES
        and cudnn_is_installed()
        and _has_graphs(device, size, entries, heads, window)
    )


@cache
def cudnn_is_installed() -> bool:
    """Whether cuDNN's frontend is there, and finds a cuDNN that is new enough."""
    try:
        import cudnn  # pyright: ignore[reportMissingImports]

        return cudnn.backend_version() >= VERSION
    except (ImportError, OSError, RuntimeError):  # the last: it finds no cuDNN
        return False


@cache
def _has_graphs(device: torch.device, size: int, entries: int, heads: Heads, window: int | None) -> bool:
    try:
        make_graphs(device, size, entries, heads, window)
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"cuDNN does not compute attention on {name}, FlexAttention does: {error}", stacklevel=2)
        return False
    return True


def entries_of(document: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Where each entry begins in the stream, [B+1], and its length, int32 [B]; found without asking the host.

    An entry is a run of equal `document` [T]; padding is one, too. There must be enough of them.
    """
    is_later = torch.cat([torch.zeros_like(document[:1], dtype=torch.bool), document[1:] != document[:-1]])
    begin = torch.searchsorted(is_later.cumsum(0), torch.arange(entries + 1, device=document.device))
    return begin, begin.diff().int()


def packed_attention(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, length: Tensor, window: int | None
) -> Tensor:
    """Softmax attention, [T, H, E]: a position sees itself and what came before it in its entry.

    Groups of H/J query heads share a key and value head. On CUDA in bfloat16 or float16 only.

    Args:
        begin, length: of the entries, from `entries_of`; every position must be in one.
        window: positions seen, itself included; None for all.
    """
    return packed_attention_operator(q_THE, k_TJE, v_TJE, begin, length, window)[0]


@library.custom_op("bytelatent::packed_attention", mutates_args=())
def packed_attention_operator(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, length: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Also gives, for the gradients, the logarithms of the sums of the weights, float32 [T, H]."""
    q, k, v = (x.contiguous() for x in (q_THE, k_TJE, v_TJE))
    compute = cudnn_attention if q.is_cuda else plain_packed_attention
    return compute(q, k, v, begin, length, window)


@library.custom_op("bytelatent::packed_attention_backward", mutates_args=())
def packed_attention_backward_operator(
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
    d_out, q, k, v = (x.contiguous() for x in (d_out, q_THE, k_TJE, v_TJE))
    compute = cudnn_attention_backward if q.is_cuda else plain_packed_attention_backward
    return compute(d_out, q, k, v, begin, length, window, out_THE, logsum_TH)


@packed_attention_operator.register_fake
def _(q_THE: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q_THE.new_empty(q_THE.shape), q_THE.new_empty(q_THE.shape[:2], dtype=torch.float32)


@packed_attention_backward_operator.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, out_THE, logsum_TH = ctx.saved_tensors
    return *packed_attention_backward_operator(d_out, *inputs, ctx.window, out_THE, logsum_TH), None, None, None


packed_attention_operator.register_autograd(_gradients, setup_context=_save_for_backward)


def plain_packed_attention(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, length: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q_THE.device.type, enabled=False):
        scores_HTT = _scores(q_THE, k_TJE, begin, window)
        logsum_HT = scores_HTT.logsumexp(-1)
        weight_HTT = (scores_HTT - logsum_HT.unsqueeze(-1)).exp()
        out_THE = torch.einsum("hqk,khe->qhe", weight_HTT, _for_all_heads(v_TJE, q_THE))
    return out_THE.to(q_THE.dtype).contiguous(), logsum_HT.T.contiguous()


def plain_packed_attention_backward(
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
    k, v = (_for_all_heads(x, q_THE) for x in (k_TJE, v_TJE))
    q, d_out, scale = q_THE.float(), d_out.float(), q_THE.shape[-1] ** -0.5
    weight_HTT = (_scores(q_THE, k_TJE, begin, window) - logsum_TH.T.unsqueeze(-1)).exp()
    d_weight_HTT = torch.einsum("qhe,khe->hqk", d_out, v) - (d_out * out_THE).sum(-1).T.unsqueeze(-1)
    d_scores_HTT = weight_HTT * d_weight_HTT * scale
    d_q = torch.einsum("hqk,khe->qhe", d_scores_HTT, k)
    d_k, d_v = (torch.einsum("hqk,qhe->khe", *x) for x in ((d_scores_HTT, q), (weight_HTT, d_out)))
    shared = k_TJE.shape[1], -1
    d_k, d_v = (x.unflatten(1, shared).sum(2).to(k_TJE.dtype).contiguous() for x in (d_k, d_v))
    return d_q.to(q_THE.dtype).contiguous(), d_k, d_v


def _scores(q_THE: Tensor, k_TJE: Tensor, begin: Tensor, window: int | None) -> Tensor:
    """Scores in float32, [H, T, T]; minus infinity where a position is not seen."""
    place = torch.arange(len(q_THE), device=q_THE.device)
    entry = torch.searchsorted(begin, place, right=True)
    distance = place[:, None] - place
    seen_TT = (entry[:, None] == entry) & (distance >= 0)
    if window is not None:
        seen_TT &= distance < window
    scores = torch.einsum("qhe,khe->hqk", q_THE.float(), _for_all_heads(k_TJE, q_THE)) * q_THE.shape[-1] ** -0.5
    return scores.masked_fill(~seen_TT, -torch.inf)


def _for_all_heads(x_TJE: Tensor, q_THE: Tensor) -> Tensor:
    """Each query head's keys, or values, in float32, [T, H, E]."""
    return x_TJE.float().repeat_interleave(q_THE.shape[1] // x_TJE.shape[1], dim=1)


# cuDNN's graphs


class GraphShape(NamedTuple):
    """What a graph is made for: [B, H, S, E] of which each entry has a length of its own, end to end."""

    device: torch.device
    size: int  # S, at least the length of all entries together
    entries: int
    heads: Heads
    window: int | None

    @classmethod
    def of(cls, device: torch.device, size: int, entries: int, heads: Heads, window: int | None) -> "GraphShape":
        size = -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE
        return cls(device, size, entries, heads, window if window is not None and window < size else None)


@dataclass(frozen=True)
class CudnnGraph:
    device: torch.device
    graph: Any
    numbers: dict[str, int]  # cuDNN's number of each tensor
    per_position: set[int]  # how many numbers a position has in tensors, for the places where entries begin
    workspace: int  # bytes

    def run(self, begin: Tensor, length: Tensor, **tensors: Tensor) -> None:
        """Read and write contiguous tensors."""
        import cudnn  # pyright: ignore[reportMissingImports]

        begins = {f"begin_{multiple}": begin * multiple for multiple in self.per_position}
        given = {**tensors, "length": length, **begins}
        handle = _handle(self.device)
        workspace = torch.empty(max(self.workspace, 1), dtype=torch.uint8, device=self.device)
        numbered = {number: given[name] for name, number in self.numbers.items()}
        # Threads share the handle, which has one stream: the next batch's entropies may be computed on another one. And
        # what ran on a stream that is being captured would be captured, with memory that is soon another's.
        with torch.cuda.device(self.device), _USES_HANDLE:
            cudnn.set_stream(handle, torch.cuda.current_stream(self.device).cuda_stream)
            self.graph.execute(numbered, workspace, handle=handle)


def make_graphs(device: torch.device, size: int, entries: int, heads: Heads, window: int | None) -> None:
    """Make the graphs, which takes a second for the first ones.

    Raises:
        RuntimeError: cuDNN has none for this device or these shapes.
    """
    import cudnn  # pyright: ignore[reportMissingImports]

    shape = GraphShape.of(device, size, entries, heads, window)
    try:
        _graph(shape, is_backward=False)
        _graph(shape, is_backward=True)
    except cudnn.cudnnGraphNotSupportedError as error:
        raise RuntimeError(str(error)) from error


def cudnn_attention(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, length: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    out_THE = torch.empty_like(q_THE)
    logsum_TH = q_THE.new_empty(q_THE.shape[:2], dtype=torch.float32)
    graph = _graph(_shape_of(q_THE, k_TJE, length, window), is_backward=False)
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
    graph = _graph(_shape_of(q_THE, k_TJE, length, window), is_backward=True)
    inputs = {"q": q_THE, "k": k_TJE, "v": v_TJE, "out": out_THE, "logsum": logsum_TH, "d_out": d_out}
    graph.run(begin, length, **inputs, d_q=d_q, d_k=d_k, d_v=d_v)
    return d_q, d_k, d_v


def _shape_of(q_THE: Tensor, k_TJE: Tensor, length: Tensor, window: int | None) -> GraphShape:
    assert q_THE.dtype in HALVES, f"cuDNN computes attention in bfloat16 and float16, not in {q_THE.dtype}"
    size, num_heads, head_dim = q_THE.shape
    heads = Heads(q_THE.dtype, num_heads, k_TJE.shape[1], head_dim)
    return GraphShape.of(q_THE.device, size, length.shape[0], heads, window)


@cache
def _handle(device: torch.device) -> Any:
    import cudnn  # pyright: ignore[reportMissingImports]

    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def _graph(shape: GraphShape, is_backward: bool) -> CudnnGraph:
    """Describe a graph to cuDNN and build it."""
    import cudnn  # pyright: ignore[reportMissingImports]

    device, size, entries, (dtype, num_heads, num_kv_heads, head_dim), window = shape
    kinds = cudnn.data_type
    kind = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[dtype]
    queries, keys = (kind, num_heads, head_dim), (kind, num_kv_heads, head_dim)
    layouts: dict[str, tuple[Any, int, int]] = {"logsum": (kinds.FLOAT, num_heads, 1)}
    layouts |= dict.fromkeys(("q", "out", "d_out", "d_q"), queries) | dict.fromkeys(("k", "v", "d_k", "d_v"), keys)
    per_position = {heads * width for _, heads, width in layouts.values()}
    graph = cudnn.pygraph(
        io_data_type=kind,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=_handle(device),
    )
    columns = {f"begin_{multiple}": (entries + 1, kinds.INT64) for multiple in per_position}
    columns["length"] = entries, kinds.INT32
    tensors: dict[str, Any] = {
        name: graph.tensor(name=name, dim=[rows, 1, 1, 1], stride=[1, 1, 1, 1], data_type=column)
        for name, (rows, column) in columns.items()
    }

    def layout_of(name: str) -> tuple[Any, list[int], list[int], Any]:
        """A tensor's type, shape, strides, and where its entries begin."""
        its_kind, heads, width = layouts[name]
        multiple = heads * width
        stride = [size * multiple, width, multiple, 1]
        return its_kind, [entries, heads, size, width], stride, tensors[f"begin_{multiple}"]

    def declare(name: str) -> Any:
        its_kind, dim, stride, begin = layout_of(name)
        tensors[name] = graph.tensor(name=name, dim=dim, stride=stride, data_type=its_kind, ragged_offset=begin)
        return tensors[name]

    mask: dict[str, Any] = {
        "attn_scale": head_dim**-0.5,
        "use_padding_mask": True,  # entries have lengths
        "seq_len_q": tensors["length"],
        "seq_len_kv": tensors["length"],
        "max_total_seq_len_q": size,
        "max_total_seq_len_kv": size,
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_right_bound": 0,
    }
    if window is not None:
        mask["diagonal_band_left_bound"] = window
    inputs = {name: declare(name) for name in "qkv"}
    if is_backward:
        inputs |= {"o": declare("out"), "dO": declare("d_out"), "stats": declare("logsum")}
        results = graph.sdpa_backward(name="attention_backward", **inputs, **mask)
    else:
        results = graph.sdpa(name="attention", **inputs, generate_stats=True, **mask)
    for name, result in zip(("d_q", "d_k", "d_v") if is_backward else ("out", "logsum"), results, strict=True):
        its_kind, dim, stride, begin = layout_of(name)
        result.set_output(True).set_data_type(its_kind).set_dim(dim).set_stride(stride)
        result.set_ragged_offset(begin)
        tensors[name] = result
    with torch.cuda.device(device):
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    numbers = {name: tensor.get_uid() for name, tensor in tensors.items()}
    return CudnnGraph(device, graph, numbers, per_position, graph.get_workspace_size())
