"""Where to compute: device, precision, threads and memory."""

import os
import platform
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

import torch

from bytelatent.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": None}  # precisions that models are loaded in
TRIAL = 3  # pieces of work that a number of threads is tried on
TRIAL_SHARE = 0.05  # of the time, about, goes into trials
CGROUP = Path("/sys/fs/cgroup")  # of Linux
# Peak FLOP/s of dense products in bfloat16, as the makers state them, by part of the device's name; first match counts.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def choose_device(device: str | int | torch.device = "auto") -> torch.device:
    """The device to compute on.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`, as a name or as torch's own; `auto` takes CUDA, else MPS, else the CPU.

    Raises:
        UserError: there is no such device, or this machine, its driver or this build of torch cannot use it.
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps") or isinstance(device, bool):
        raise UserError(f"device: '{device}' is not known; use auto, cpu, cuda, cuda:1 or mps")
    if (why := _why_not(chosen)) is not None:
        raise UserError(f"device: '{device}' cannot be used: {why}; device=auto takes what there is")
    return chosen


def _why_not(device: torch.device) -> str | None:
    """Why this process cannot compute on a device, and what to do; None if it can."""
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "this machine, or this build of torch, has no mps"
    if device.type != "cuda":
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU only; install a build for CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU; install its driver, or a newer one"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"this machine has {torch.cuda.device_count()} of cuda, counted from 0"
    return None


def precision_of_weights(dtype: str | torch.dtype) -> torch.dtype | None:
    """The precision to load weights in.

    Args:
        dtype: `float32` or `bfloat16`, as a name or as torch's own; `auto` for that of the file.

    Returns:
        None for that of the file.

    Raises:
        UserError: it is another.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHTS:
        raise UserError(f"dtype: '{dtype}' is not known; use float32, bfloat16 or auto")
    return WEIGHTS[name]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def keep_precision(convert: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """What a conversion of a module's tensors makes of one that changes its device only."""
    found = convert(tensor)
    return found if found.dtype == tensor.dtype else tensor.to(found.device)


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send what the host has to the device; nothing waits until that is done."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; weights, norms and sums stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of dense products as the maker states it; None where that is unknown."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(MIG|Laptop)\b", name):  # a part of the device, or a slower one
        return None
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def device_name(device: torch.device) -> str:
    """A device as its maker calls it, for results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    machine = platform.machine()
    if device.type == "cpu" and (info := Path("/proc/cpuinfo")).is_file():
        lines = info.read_text(errors="replace").splitlines()
        machine = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), machine)
    return f"{device.type}, {machine}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or of the machine, was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("allocate memory", "out of memory", "not enough memory")
    )


def free_memory() -> int | None:
    """Bytes of this machine's memory that are available, within its control group; None where that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # part of what a group uses is cache
        with suppress(OSError, ValueError):  # no such group, or "max"
            free = min(free, int((CGROUP / limit).read_text()))
    return free


def peak_memory(device: torch.device | None = None) -> int:
    """The most bytes that this process has held: on its GPU where it computes there, else in main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated(device):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Threads:
    """Times pieces of work on the CPU with one thread and with more, and uses the fastest number.

    The threads of an operation wait for one another. Where other programs take the cores, all of them wait for the one
    without a core, and a single thread can be faster than all. As the machine's load changes, other numbers are tried
    again from time to time. The pieces must be of about equal size. At its end the block restores torch's number.

    Args:
        counts: numbers of threads to choose from, the first one first; a single one leaves torch as it is.

    Attributes:
        count: the number in use.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts = counts
        self.count = counts[0]
        self._times: deque[float] = deque(maxlen=TRIAL)  # of the last pieces with the fastest number
        self._best = 0  # index of the fastest number in `counts`
        self._tried: int | None = None  # index of the number on trial
        self._trial: list[float] = []
        self._until_trial = 0.0  # seconds of work
        self._num_trials = 0

    @classmethod
    def of(cls, device: torch.device, may_choose: bool = True) -> Self:
        """For work on a device: one thread, half of torch's, or all of them.

        The number stays torch's own on another device than the CPU, where OMP_NUM_THREADS sets it, or where results
        must be the same bit for bit each time (`may_choose=False`).
        """
        num_threads = torch.get_num_threads()
        if not may_choose or device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
            return cls([num_threads])
        return cls(sorted({1, max(num_threads // 2, 1), num_threads}))

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        self._use(self._best)
        return self

    def __exit__(self, *_: object) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)

    def took(self, seconds: float) -> None:
        """Count a piece of work that was done with the current number of threads."""
        if len(self.counts) == 1:
            return
        if self._tried is None:
            self._times.append(seconds)
            self._until_trial -= seconds
            if len(self._times) == TRIAL and self._until_trial <= 0:
                self._try_another()
            return
        self._trial.append(seconds)
        usual = sum(self._times) / len(self._times)
        if len(self._trial) == TRIAL or seconds > 2 * usual:  # one piece that takes as long says enough
            if sum(self._trial) / len(self._trial) < usual:
                self._best = self._tried
                self._times = deque(self._trial, maxlen=TRIAL)
            self._until_trial = sum(self._trial) / TRIAL_SHARE
            self._tried, self._trial = None, []
            self._use(self._best)

    def _try_another(self) -> None:
        others = [index for index in range(len(self.counts)) if index != self._best]
        self._tried = others[self._num_trials % len(others)]
        self._num_trials += 1
        self._use(self._tried)

    def _use(self, index: int) -> None:
        self.count = self.counts[index]
        if torch.get_num_threads() != self.count:
            torch.set_num_threads(self.count)


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """The function, for what keeps tensors: those that inference mode makes cannot be changed outside it."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return called
