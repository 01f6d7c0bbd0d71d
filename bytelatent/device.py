"""Where to compute, and how precisely."""

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from bytelatent.errors import UserError

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": None}  # precisions that models are loaded in
CGROUP = Path("/sys/fs/cgroup")  # of Linux
# Dense products a second in bfloat16, as the makers state them, by what a device's name holds; the first that fits.
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


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; weights, norms and sums stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that the maker states for dense products; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(MIG|Laptop)\b", name):  # a part of the device, or a slower one
        return None
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or of the machine, was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("allocate memory", "out of memory", "not enough memory")
    )


def free_memory() -> int | None:
    """Bytes of this machine's memory that can be had at most, by its control group too; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # what a group uses is partly cache, and can be had
        with suppress(OSError, ValueError):  # no such group, or "max"
            free = min(free, int((CGROUP / limit).read_text()))
    return free


def peak_memory(device: torch.device | None = None) -> int:
    """The most bytes that this process held at a time: on its GPU where it computes there, else in all."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated(device):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
