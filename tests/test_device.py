from collections.abc import Callable
from typing import Any

import pytest
import torch

from bytelatent.device import (
    TRIAL,
    TRIAL_SHARE,
    Threads,
    autocast,
    choose_device,
    choose_dtype,
    peak_flops,
    peak_memory,
    precision_of_weights,
)
from bytelatent.errors import UserError

CPU = torch.device("cpu")


def test_auto_takes_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device().type == "cpu"


@pytest.mark.parametrize(
    "name", ["gpu", "", "cpu:x", "meta", "xla", "cuda:-1", "two\nlines", None, True, 1.5, torch.device("meta")]
)
def test_a_device_that_is_not_known(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="is not known; use auto, cpu, cuda") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_torchs_own_devices() -> None:
    assert choose_device(torch.device("cpu")) == choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 1)])
@pytest.mark.parametrize(
    ("version", "why"),
    [
        (None, "cannot be used: torch .* is built for the CPU only; install a build for CUDA; device=auto takes"),
        ("12.8", "cannot be used: torch .* finds no GPU; install its driver, or a newer one; device=auto takes"),
    ],
)
def test_a_driver_that_is_missing(
    name: str | torch.device, version: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=why):
        choose_device(name)


def test_a_machine_without_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="'mps' cannot be used: this machine, or this build of torch, has no mps"):
        choose_device("mps")


def test_a_second_device_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == choose_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="'cuda:1' cannot be used: this machine has 1 of cuda"):
        choose_device("cuda:1")


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        ("auto", None),
    ],
)
def test_precisions_by_name_and_as_torchs_own(dtype: str | torch.dtype, precision: torch.dtype | None) -> None:
    assert precision_of_weights(dtype) == precision


@pytest.mark.parametrize("dtype", ["float16", torch.float16, torch.int8, "", None, 16, [], "two\nlines"])
def test_precisions_that_are_not_known(dtype: Any) -> None:
    with pytest.raises(UserError, match=r"dtype: .* is not known; use float32, bfloat16 or auto") as caught:
        precision_of_weights(dtype)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("computes", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_device_computes_in_it(
    computes: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: computes)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: computes)
    assert choose_dtype("auto", torch.device("cuda")) == dtype
    assert choose_dtype("auto", CPU) == dtype
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_dtype("float32", CPU) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_for_matrix_products(dtype: torch.dtype) -> None:
    with autocast(CPU, dtype):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(CPU, torch.bfloat16) is None


def test_peak_memory_holds_what_was_taken() -> None:
    held = torch.ones(2**25)  # 128 MiB
    assert peak_memory() > held.nbytes


# The choice of threads, on machines that are numbers: how long a piece of work takes with each number of threads.


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch is set to, in place of torch: the process keeps its threads."""
    now = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return now


def work(threads: Threads, seconds: Callable[[int], float], until: float) -> list[tuple[int, float]]:
    """Pieces of work for so many seconds: with how many threads each was done, and how long it took."""
    done, passed = [], 0.0
    while passed < until:
        took = seconds(torch.get_num_threads())
        done.append((torch.get_num_threads(), took))
        passed += took
        threads.took(took)
    return done


IDLE = {1: 0.4, 4: 0.2, 8: 0.15}
BUSY = {1: 0.6, 4: 3.0, 8: 17.0}
HALF_BUSY = {1: 0.5, 4: 0.2, 8: 2.0}


@pytest.mark.parametrize(("machine", "best"), [(IDLE, 8), (BUSY, 1), (HALF_BUSY, 4)])
def test_most_of_the_work_is_done_with_the_fastest_number(
    machine: dict[int, float], best: int, torch_threads: list[int]
) -> None:
    with Threads.of(CPU) as threads:
        done = work(threads, machine.__getitem__, 600)
    others = sum(took for count, took in done[20:] if count != best)
    assert others < 2.5 * TRIAL_SHARE * sum(took for _, took in done[20:])
    assert {count for count, _ in done} == set(machine)


def test_a_number_that_is_hopeless_is_tried_once_at_a_time(torch_threads: list[int]) -> None:
    with Threads.of(CPU) as threads:
        counts = [count for count, _ in work(threads, BUSY.__getitem__, 200)]
    assert counts[: TRIAL + 2] == [1] * TRIAL + [4, 1]


def test_it_follows_the_machine(torch_threads: list[int]) -> None:
    with Threads.of(CPU) as threads:
        work(threads, IDLE.__getitem__, 60)
        assert threads.count == 8
        slower = work(threads, BUSY.__getitem__, 600)
        assert [count for count, _ in slower[-5:]] == [1] * 5
        work(threads, IDLE.__getitem__, 600)
        assert threads.count == 8


def test_torch_has_its_threads_back(torch_threads: list[int]) -> None:
    with Threads.of(CPU) as threads:
        work(threads, BUSY.__getitem__, 20)
        assert torch_threads == [1]
    assert torch_threads == [8]


def test_an_error_gives_them_back_too(torch_threads: list[int]) -> None:
    def stopped() -> None:
        with Threads.of(CPU):
            assert torch_threads == [1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert torch_threads == [8]


@pytest.mark.parametrize("why", ["a GPU", "the user says", "the same bits"])
def test_nothing_is_chosen(why: str, monkeypatch: pytest.MonkeyPatch, torch_threads: list[int]) -> None:
    if why == "the user says":
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with Threads.of(torch.device("cuda") if why == "a GPU" else CPU, why != "the same bits") as threads:
        done = work(threads, BUSY.__getitem__, 100)
        assert torch_threads == [8]
    assert {count for count, _ in done} == {8}


def test_two_cores_are_one_or_two_threads(torch_threads: list[int]) -> None:
    torch_threads[0] = 2
    assert list(Threads.of(CPU).counts) == [1, 2]
    torch_threads[0] = 1
    assert list(Threads.of(CPU).counts) == [1]
