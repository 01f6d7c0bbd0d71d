"""A stand-in for cuDNN's frontend: what a graph of attention says is computed one entry and head at a time."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Described:
    """A tensor of a graph."""

    def __init__(self, number: int, **said: Any):
        self.number = number
        self.said: dict[str, Any] = said

    def get_uid(self) -> int:
        return self.number

    def __getattr__(self, name: str) -> Any:
        """`set_dim(...)` and the like."""
        assert name.startswith("set_"), name

        def note(value: Any) -> "Described":
            self.said[name.removeprefix("set_")] = value
            return self

        return note

    def of_entry(self, given: dict[int, Tensor], entry: int, size: int) -> Tensor:
        """Its positions in an entry, [heads, size, width], in the memory that is given."""
        assert given[self.number].dtype == self.said["data_type"]
        assert given[self.number].is_contiguous()
        first = int(given[self.said["ragged_offset"].number][entry])
        dim, stride = self.said["dim"], self.said["stride"]
        assert size <= dim[2]
        return given[self.number].view(-1).as_strided((dim[1], size, dim[3]), stride[1:], first)


class Graph:
    def __init__(self, **kinds: Any):
        self.tensors: list[Described] = []
        self.work: Any = None

    def tensor(self, **said: Any) -> Described:
        self.tensors.append(Described(len(self.tensors), **said))
        return self.tensors[-1]

    def sdpa(self, **said: Any) -> tuple[Described, Described]:
        assert said["generate_stats"]
        self.work, self.said, self.given = self._forward, said, (self.tensor(), self.tensor())
        return self.given

    def sdpa_backward(self, **said: Any) -> tuple[Described, ...]:
        self.work, self.said, self.given = self._backward, said, (self.tensor(), self.tensor(), self.tensor())
        return self.given

    def validate(self, *_: Any) -> None: ...

    build_operation_graph = create_execution_plans = check_support = build_plans = validate

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, given: dict[int, Tensor], workspace: Tensor, handle: Any) -> None:
        assert given.keys() == {tensor.number for tensor in self.tensors}
        lengths = given[self.said["seq_len_q"].number]
        assert self.said["seq_len_q"] is self.said["seq_len_kv"]
        assert self.said["use_padding_mask"]
        assert self.said["diagonal_alignment"] == "top left"
        assert self.said["diagonal_band_right_bound"] == 0
        for entry, size in enumerate(lengths.tolist()):
            self.work(lambda tensor, entry=entry, size=size: tensor.of_entry(given, entry, size))

    def _attend(self, of: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        q, k, v = (of(self.said[name]).float().requires_grad_() for name in "qkv")
        place = torch.arange(q.shape[1])
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < self.said.get("diagonal_band_left_bound", 1 << 40))
        group = q.shape[0] // k.shape[0]
        scores = q @ k.repeat_interleave(group, 0).mT * self.said["attn_scale"]
        scores = scores.masked_fill(~seen, -torch.inf)
        return [q, k, v], scores.softmax(-1) @ v.repeat_interleave(group, 0), scores.logsumexp(-1, keepdim=True)

    def _forward(self, of: Any) -> None:
        with torch.enable_grad():
            _, out, logsum = self._attend(of)
        for tensor, value in zip(self.given, (out, logsum), strict=True):
            of(tensor).copy_(value.detach())

    def _backward(self, of: Any) -> None:
        with torch.enable_grad():
            inputs, out, logsum = self._attend(of)
            gradients = torch.autograd.grad(out, inputs, of(self.said["dO"]).float())
        torch.testing.assert_close(of(self.said["o"]).float(), out.detach(), atol=2e-2, rtol=1e-2)
        torch.testing.assert_close(of(self.said["stats"]), logsum.detach(), atol=1e-4, rtol=1e-4)
        for tensor, value in zip(self.given, gradients, strict=True):
            of(tensor).copy_(value)


def cudnn() -> Any:
    """The module."""
    kinds = {"BFLOAT16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}
    whole = {"INT32": torch.int32, "INT64": torch.int64}
    return SimpleNamespace(
        pygraph=Graph,
        data_type=SimpleNamespace(**kinds, **whole),
        diagonal_alignment=SimpleNamespace(TOP_LEFT="top left"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="fallback"),
        cudnnGraphNotSupportedError=NotImplementedError,
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: None,
        backend_version=lambda: 91900,
    )
