"""Keys and values in 8 bits: how far they are from what was given, that they are read back exactly, and the kernels."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.kernels import decode_attention, window_attention
from bytelatent.kernels.decode_attention import plain_decode_attention
from bytelatent.kernels.quantized_heads import dequantize_heads, quantize_heads
from bytelatent.kernels.rotary import rotary_embedding
from tests.kernels import slow
from tests.kernels.test_decode_kernels import check

HEADS = st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=4, max_size=4)


@given(heads=st.lists(HEADS, min_size=1, max_size=3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_heads_are_read_back(heads: list[list[float]], dtype: torch.dtype) -> None:
    x = torch.tensor(heads).to(dtype)
    x = torch.where(x.isfinite(), x, 0)
    values, exponent = quantize_heads(x)
    assert (values.dtype, exponent.dtype, exponent.shape) == (torch.int8, torch.uint8, x.shape[:-1])
    found = dequantize_heads(values, exponent, dtype)
    largest = x.double().abs().amax(-1, keepdim=True)
    assert bool(((found.double() - x.double()).abs() <= largest / 64 + 2.0**-125).all())
    assert torch.equal(found, dequantize_heads(values, exponent, torch.float64).to(dtype))
    assert torch.equal(found.double(), dequantize_heads(values, exponent, torch.float64))  # exact in bfloat16, too
    for one, again in zip((values, exponent), quantize_heads(found), strict=True):
        assert torch.equal(one, again)


def test_the_error_is_that_of_8_bits() -> None:
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    error = dequantize_heads(*quantize_heads(x), torch.float32) - x
    assert 0.004 < float(error.norm() / x.norm()) < 0.013  # a step of 1/64 to 1/128 of the largest of 64, over sqrt(12)
    assert abs(float(error.mean())) < 1e-4


def test_kernels_are_their_plain_forms() -> None:
    every = {"in_8_bits": True}
    check(
        attention=[
            case | every
            for case in (
                {"positions": [0, 3, 31], "slots": 20, "window": 20, "steps": 2},
                {"positions": [70, 7], "slots": 40, "window": 25, "heads": 4, "kv_heads": 1, "steps": 2},
                {"positions": [5, 9, 11, 3], "slots": 16, "window": 16, "rows": [5, -1, 0, 2]},
                {"positions": [90, 3, 0], "slots": 128, "window": None, "splits": 4, "steps": 2},
                {"positions": [40, 20], "slots": 48, "window": 40, "splits": 2, "rows": [-1, 1], "heads": 6},
                {"positions": [17], "slots": 24, "window": 24, "dtype": "bfloat16"},
                {"positions": [17], "slots": 32, "window": 24, "heads": 4, "dtype": "float16"},
            )
        ],
        rounding=[{"sizes": [1, 70, 57], "heads": 3, "head_dim": 16}, {"sizes": [64], "heads": 1, "head_dim": 64}],
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [5, None])
def test_plain_attention_reads_what_it_stores(window: int | None, kv_heads: int) -> None:
    """As the slow form with full caches does for keys and values that were rounded before."""
    torch.manual_seed(0)
    heads, size, slots, rows = 4, 16, window or 32, torch.tensor([2])
    shape = (2, 3, slots, kv_heads, size)
    values, scales = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[:-1], dtype=torch.uint8)
    full, rotary = torch.zeros(shape, dtype=torch.float64), rotary_embedding(torch.arange(20), size, 1e4)
    options: dict[str, Any] = {"heads": heads, "window": window, "row_B": rows}
    for position in range(20):
        qkv, at = torch.randn(1, (heads + 2 * kv_heads) * size), torch.tensor([position])
        found = plain_decode_attention(qkv, values[0], values[1], at, rotary, scales=[*scales], **options)
        q, k, v = qkv.view(-1, size).split([heads, kv_heads, kv_heads])
        q, k = (slow.rotate(x, rotary[position]) for x in (q, k))
        for table, x in zip(full, (k, v), strict=True):
            table[2, position % slots] = by_hand(x)
        seen = torch.arange(max(position - (window or 99) + 1, 0), position + 1) % slots
        expected = slow.attend(q, full[0, 2, seen], full[1, 2, seen]).flatten()
        torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=1e-5)
        for table, held, scale in zip(full, values, scales, strict=True):
            assert torch.equal(dequantize_heads(held, scale, torch.float64)[2], table[2])


def by_hand(x_JE: Tensor) -> Tensor:
    """Each number as a whole one of steps, of which the largest has 64 to 128."""
    out = []
    for head in x_JE.double().tolist():
        step = 1.0
        while max(map(abs, head)) / step >= 128:
            step *= 2
        while max(map(abs, head)) / step < 64:
            step /= 2
        out.append([max(-127, min(127, round(number / step))) * step for number in head])
    return torch.tensor(out, dtype=torch.float64)


COMPILED = {"H": 16, "J": 16, "E": 64, "WINDOW": 512, "SPLITS": 4, "BLOCK": 64, "STAGES": 2, "OVERLAP": True}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("attend_one", {}),
        ("attend_several", {"J": 4, "QUERIES": 16, "WINDOW": 0}),
        ("attend_several", {"J": 4, "QUERIES": 16, "k_scale_ptr": None, "v_scale_ptr": None}),
        ("rotate_in_place_kernel", {"ROW": 3072, "PADDED": 16}),
    ],
)
def test_kernels_compile(name: str, changes: dict[str, Any]) -> None:
    """For a GPU, which takes none."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(window_attention if "rotate" in name else decode_attention, name)
    names, constants = kernel.arg_names, COMPILED | changes
    floats = dict.fromkeys(("rotary_ptr", "found_ptr", "weights_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    kinds = dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*u8") | floats | {"scale": "fp32"}
    kinds |= dict.fromkeys(("position_ptr", "row_ptr"), "*i64") | dict.fromkeys(("run_ptr", "arrived_ptr"), "*i32")
    kinds |= dict.fromkeys(("qkv_row", "out_row", "R"), "i32") | dict.fromkeys(("qkv_ptr", "out_ptr"), "*bf16")
    in_8_bits = "rotate" not in name and constants.get("k_scale_ptr", "") is not None
    kinds |= dict.fromkeys(("k_ptr", "v_ptr"), "*i8" if in_8_bits else "*bf16")
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {n: kinds[n] for n in names},
        {(names.index(n),): value for n, value in constants.items() if n in names},
        {(at,): [["tt.divisibility", 16]] for at, n in enumerate(names) if n.endswith("_ptr") and n not in constants},
    )
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm
