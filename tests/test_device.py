import pytest
import torch

from bytelatent.device import autocast, choose_device, choose_dtype
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


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", "xla", "cuda:-1", "two\nlines"])
def test_a_device_that_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="is none; use auto, cpu, cuda"):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_this_machine_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"has no {name.split(':')[0]}; use device=auto"):
        choose_device(name)


def test_a_second_device_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(UserError, match="'cuda:1' is not there"):
        choose_device("cuda:1")


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
