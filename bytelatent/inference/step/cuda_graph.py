"""Work as a CUDA graph, with parts that run side by side and parts that run only on a condition on the device.

On other devices than CUDA the parts run one after another.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bytelatent.kernels.launch import overlapped

_capturing: "Graph | None" = None


Part = Literal["graph", "condition", "byte LM", "closing"]  # of a graph; all may run at once


@cache
def _streams(device: int) -> dict[Part, torch.cuda.Stream]:
    """A stream for each part of all graphs. They are made together, as PyTorch has 32 and gives them out in turn: parts
    that run at once must not share one.
    """
    return {part: torch.cuda.Stream(device) for part in get_args(Part)}


class Graph:
    """Some work, captured: to run it again is one launch. It runs once before, so that its kernels are compiled."""

    def __init__(self, work: Callable[[], None], overlap: bool = True):
        global _capturing
        self._graph = torch.cuda.CUDAGraph()
        self._pools: list[Any] = []  # of the parts that do not always run; tensors lie there as long as the graph does
        stream = _streams(torch.cuda.current_device())["graph"]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with overlapped(overlap), torch.cuda.stream(stream):
                work()
                stream.synchronize()
                _capturing = self
                with torch.cuda.graph(self._graph, stream=stream):
                    work()
        finally:
            _capturing = None
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> None:
        self._graph.replay()

    def add_if(self, run: Tensor, work: Callable[[], None]) -> None:
        """Capture `work` as a part that runs only where `run` is not 0."""
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]

        stream, inner = torch.cuda.current_stream(), _streams(torch.cuda.current_device())["condition"]
        graph = _done(runtime.cudaStreamGetCaptureInfo(stream.cuda_stream))[2]
        handle = _done(runtime.cudaGraphConditionalHandleCreate(graph, 0, 0))
        _set_condition(handle, run, stream)
        before = _done(runtime.cudaStreamGetCaptureInfo(stream.cuda_stream))[3]
        node = runtime.cudaGraphNodeParams()
        node.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        node.conditional.handle = handle
        node.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        node.conditional.size = 1
        added = _done(runtime.cudaGraphAddNode(graph, before, None, len(before), node))
        replaces = runtime.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
        _done(runtime.cudaStreamUpdateCaptureDependencies(stream.cuda_stream, [added], None, 1, replaces))
        body, mode = node.conditional.phGraph_out[0], runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        # The graph's own pool is for streams that are captured with it. This one is captured for itself.
        self._pools.append(torch.cuda.MemPool())
        with torch.cuda.stream(inner), torch.cuda.use_mem_pool(self._pools[-1]):
            _done(runtime.cudaStreamBeginCaptureToGraph(inner.cuda_stream, body, None, None, 0, mode))
            try:
                work()
            finally:
                _done(runtime.cudaStreamEndCapture(inner.cuda_stream))


def run_if(run: Tensor, work: Callable[[], None]) -> None:
    """Do `work` if `run`, one number on the device, is not 0.

    In a graph on CUDA the device decides. Not captured, or without the package `cuda-bindings`, CUDA always does it, so
    it must do no harm.
    """
    if not run.is_cuda:
        if bool(run):
            work()
    elif _capturing is not None and has_conditions():
        _capturing.add_if(run, work)
    else:
        if has_conditions():
            _set_condition_kernel(run.device)  # while it is captured nothing can be loaded
        work()


class SideStream:
    """A stream for a part of a graph. Its work runs beside what follows, until `join`."""

    def __init__(self, device: torch.device, part: Part = "byte LM"):
        self._stream = None
        if device.type == "cuda":
            self._stream = _streams(torch.cuda.current_device() if device.index is None else device.index)[part]

    @contextmanager
    def beside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


SET_CONDITION = r"""
typedef __device_builtin__ unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(cudaGraphConditionalHandle, unsigned int);
extern "C" __global__ void set_condition(cudaGraphConditionalHandle handle, const int* run) {
    cudaGraphSetConditional(handle, *run != 0);
}
"""


def _set_condition(handle: Any, run: Tensor, stream: torch.cuda.Stream) -> None:
    """Launch the kernel that sets a graph's condition from `run`, int32: only the device may do so."""
    from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

    assert run.dtype == torch.int32, f"{run.dtype}"
    arguments = (int(handle), run.data_ptr()), (ctypes.c_ulonglong, ctypes.c_void_p)
    _done(
        driver.cuLaunchKernel(_set_condition_kernel(run.device), 1, 1, 1, 1, 1, 1, 0, stream.cuda_stream, arguments, 0)
    )


@cache
def _set_condition_kernel(device: torch.device) -> Any:
    from cuda.bindings import driver, nvrtc  # pyright: ignore[reportMissingImports]

    major, minor = torch.cuda.get_device_capability(device)
    program = _done(nvrtc.nvrtcCreateProgram(SET_CONDITION.encode(), b"set_condition.cu", 0, [], []))
    options = [f"--gpu-architecture=compute_{major}{minor}".encode()]
    _done(nvrtc.nvrtcCompileProgram(program, len(options), options))
    ptx = b" " * _done(nvrtc.nvrtcGetPTXSize(program))
    _done(nvrtc.nvrtcGetPTX(program, ptx))
    return _done(driver.cuModuleGetFunction(_done(driver.cuModuleLoadData(ptx)), b"set_condition"))


@cache
def has_conditions() -> bool:
    """Whether graphs may have conditional parts: with CUDA 13, whose package `cuda-bindings` comes with PyTorch."""
    try:
        from cuda import bindings  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return min(int(version.split(".")[0]) for version in (bindings.__version__, torch.version.cuda or "0")) >= 13


def _done(answer: tuple[Any, ...]) -> Any:
    """The results of a CUDA call, after its error code."""
    error, *found = answer
    if int(error) != 0:
        raise RuntimeError(f"CUDA graph: {error!r}")
    return found[0] if len(found) == 1 else tuple(found)
