"""The kernels of a decoding step in Triton's interpreter beside their plain twins, and the twins beside the model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.inference.sampling import OPTIONS
from bytelatent.kernels.decode_attention import launch_for_attention, plain_decode_attention
from bytelatent.kernels.decode_cross_attention import (
    plain_append_patch_byte,
    plain_decoder_cross_attention_step,
    plain_encoder_cross_attention_step,
)
from bytelatent.kernels.gated_product import interleaved
from bytelatent.kernels.hash_embed import ngram_powers, plain_hash_embed
from bytelatent.kernels.launch import power_of_two
from bytelatent.kernels.patch_attention import ByteRanges, decoder_cross_attention, encoder_cross_attention
from bytelatent.kernels.rotary import rotary_embedding, rotate
from bytelatent.kernels.skinny_launch import launch_for
from bytelatent.kernels.skinny_linear import fold_norm, matrix_kernel, plain_skinny_linear
from bytelatent.model.attention import build_mask
from bytelatent.model.block import init_weights
from bytelatent.model.ngram_hash import PRIMES, NgramHashEmbedding
from bytelatent.model.settings import NgramHashSettings
from bytelatent.patching import MODES
from tests.inference.test_sampling import ACCEPTED
from tests.kernels.interpreter import interpreted
from tests.patching.conftest import PATCHINGS

pytest.importorskip("triton")


def check(**cases_of: list[dict]) -> None:
    """Run cases of `decode_cases.py`.

    Where there are tensor cores float16 stands for bfloat16, which the interpreter cannot multiply.
    """
    named = [(name, case) for name, cases in cases_of.items() for case in cases]
    for (_, case), errors in zip(named, interpreted("tests.kernels.decode_cases", named), strict=True):
        bound = 0.07 if "bfloat16" in case.values() else 0.01 if "float16" in case.values() else 3e-5
        assert max(errors.values()) < bound, (case, errors)
        assert errors.get("alike", 0) == 0, (case, errors)


def test_skinny_products() -> None:
    vector, looped, matrix = [1, 4, 32, 4, 8], [1, 4, 32, 4, 2], [16, 16, 32, 4, 2]
    check(
        skinny=[
            {"M": 1, "N": 37, "K": 100},
            {"M": 1, "N": 24, "K": 96, "residual": "float32", "launch": vector},
            {"M": 1, "N": 24, "K": 96, "residual": "bfloat16", "norm": False},
            {"M": 1, "N": 13, "K": 72, "gated": True, "launch": vector},
            {"M": 1, "N": 13, "K": 200, "gated": True, "launch": looped},
            {"M": 3, "N": 13, "K": 72, "launch": vector},
            {"M": 1, "N": 24, "K": 64, "gated": True, "dtype": "bfloat16"},
            {"M": 1, "N": 24, "K": 64, "dtype": "bfloat16", "residual": "float32"},
            {"M": 2, "N": 40, "K": 64, "launch": matrix},
            {"M": 5, "N": 20, "K": 100, "residual": "float32", "norm": False, "launch": matrix},
            {"M": 17, "N": 33, "K": 80, "gated": True, "launch": matrix},
            {"M": 70, "N": 17, "K": 48},
            {"M": 5, "N": 20, "K": 100, "residual": "float32", "launch": [16, 16, 16, 4, 2, 2]},
            {"M": 20, "N": 40, "K": 150, "launch": [16, 32, 16, 4, 2, 4]},
            {"M": 3, "N": 24, "K": 1200, "dtype": "float16", "norm": False},
            {"M": 4, "N": 48, "K": 64, "gated": True, "norm": False},
            {"M": 3, "N": 32, "K": 96, "dtype": "float16", "residual": "bfloat16"},
            {"M": 3, "N": 32, "K": 96, "dtype": "float16", "gated": True},
        ],
    )


@pytest.mark.parametrize("rounding", ["int8", "fp8"])
def test_skinny_products_of_quantized_matrices(rounding: str) -> None:
    """Also more rows than go to the library, of other matrices, and widths that are not a whole number of blocks."""
    looped, matrix = [1, 4, 32, 4, 2], [16, 16, 32, 4, 2]
    cases = [
        {"M": 1, "N": 37, "K": 101},
        {"M": 1, "N": 13, "K": 200, "gated": True, "launch": looped},
        {"M": 1, "N": 7, "K": 63, "gated": True, "norm": False},
        {"M": 3, "N": 25, "K": 77, "residual": "float32", "launch": looped},
        {"M": 1, "N": 24, "K": 96, "dtype": "bfloat16", "residual": "bfloat16", "norm": False},
        {"M": 5, "N": 21, "K": 99, "residual": "float32", "launch": matrix},
        {"M": 17, "N": 33, "K": 80, "gated": True, "launch": matrix},
        {"M": 3, "N": 32, "K": 96, "dtype": "float16", "gated": True},
        {"M": 2, "N": 17, "K": 64, "dtype": "float16", "norm": False},
        {"M": 70, "N": 17, "K": 48},
    ]
    check(skinny=[{**case, "rounding": rounding} for case in cases])


def test_squares_left_for_a_norm() -> None:
    """Also of blocks that are not whole, of shared widths, and of a result more precise than its matrix."""
    matrix = [16, 16, 32, 4, 2]
    check(
        leaving=[
            {"M": 1, "N": 40, "K": 64},
            {"M": 5, "N": 40, "K": 64, "launch": matrix},
            {"M": 20, "N": 72, "K": 100, "launch": [16, 16, 16, 4, 2, 2], "readers": [16, 16, 16, 4, 2, 1]},
            {"M": 3, "N": 80, "K": 96, "dtype": "float16"},
            {"M": 3, "N": 48, "K": 64, "dtype": "float16", "out": "float32", "launch": matrix, "readers": matrix},
            {"M": 18, "N": 64, "K": 64, "rounding": "int8", "launch": matrix, "readers": matrix},
        ],
    )


def test_steps_with_kernels_are_the_engines() -> None:
    case = {"name": "entropy", "kind": "assuming, seldom", "prompts": ["The", "a longer"], "new": 5}
    [found] = interpreted("tests.kernels.step_cases", [("steps", case)])
    assert found["unequal"] == 0
    assert found["error"] < 3e-5
    assert found["left"] > 0


@pytest.mark.parametrize(
    ("size", "norm", "left"), [((2304, 768), 12, False), ((768, 2048), 0, True), ((1024, 768), None, False)]
)
def test_products_of_many_rows_compile(size: tuple[int, int], norm: int | None, left: bool) -> None:
    """For a GPU, which takes none: with squares that were left, leaving squares, and with none."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (N, K), names, launch = size, matrix_kernel.arg_names, launch_for(64, *size)
    constants: dict[str, Any] = {"N": N, "K": K, "S": norm or 0, "PADDED_S": power_of_two(norm or 1)}
    constants |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k}
    constants |= {"SPLITS": launch.splits, "NORM": norm != 0, "GATED": False, "OVERLAP": True}
    absent = {"scale_ptr": True, "run_ptr": True, "squares_ptr": not norm, "left_ptr": not left}
    absent |= {"residual_ptr": not left, "sums_ptr": launch.splits == 1, "arrived_ptr": launch.splits == 1}
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    kinds = dict.fromkeys(("x_ptr", "weight_ptr", "residual_ptr", "out_ptr"), "*bf16") | {"arrived_ptr": "*i32"}
    kinds |= dict.fromkeys(("squares_ptr", "left_ptr", "sums_ptr"), "*fp32") | {"eps": "fp32", "residual_scale": "fp32"}
    kinds |= dict.fromkeys(("x_row", "residual_row", "out_row", "M"), "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        matrix_kernel,
        {name: kinds[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if kinds[name][0] == "*"},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "launch_pdl": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    assert "cubin" in compiled.asm


def test_decode_attention() -> None:
    check(
        attention=[
            {"positions": [0, 5, 40], "slots": 48, "window": None, "steps": 3},
            {"positions": [0, 3, 9, 31, 63], "slots": 20, "window": 20, "steps": 3},
            {"positions": [2, 50], "slots": 23, "window": 20, "steps": 2},
            {"positions": [0, 30], "slots": 64, "window": None, "heads": 4, "steps": 2},
            {"positions": [70, 7], "slots": 40, "window": 25, "heads": 4, "kv_heads": 1, "steps": 2},
            {"positions": [5, 37], "slots": 40, "window": 33, "heads": 4, "kv_heads": 2},
            {"positions": [5, 9, 11, 3], "slots": 32, "window": 16, "rows": [5, -1, 0, 2], "steps": 2},
            {"positions": [20, 9, 11], "slots": 32, "window": None, "rows": [1, -1, 0]},
            {"positions": [12], "slots": 32, "window": 1},
            {"positions": [90, 3, 0], "slots": 128, "window": None, "splits": 4, "steps": 2},
            {"positions": [90, 3], "slots": 100, "window": 70, "splits": 2, "heads": 4, "steps": 2},
            {"positions": [90, 20], "slots": 80, "window": 70, "splits": 4, "rows": [-1, 1], "heads": 6},
            {"positions": [17, 40], "slots": 24, "window": 24, "dtype": "bfloat16"},
            {"positions": [17, 40], "slots": 32, "window": 24, "heads": 4, "dtype": "float16"},
            {"positions": [9], "slots": 16, "window": None, "head_dim": 32},
        ],
    )


def test_attention_between_bytes_and_patches() -> None:
    check(
        reading=[
            {"sequences": 5, "keys": 2, "heads": 3, "kv_heads": 3},
            {"sequences": 3, "keys": 3, "heads": 6, "kv_heads": 2},
            {"sequences": 4, "keys": 8, "heads": 2, "kv_heads": 2, "rows": [6, -1, 0, 3]},
            {"sequences": 2, "keys": 1, "heads": 4, "kv_heads": 1},
            {"sequences": 3, "keys": 4, "heads": 2, "kv_heads": 2, "dtype": "bfloat16"},
        ],
        gathering=[
            {"counts": [3, 1, 20], "most": 20, "queries": 2, "heads": 2, "kv_heads": 2, "rows": [2, 0, 1]},
            {"counts": [5, 0, 17], "most": 32, "queries": 3, "heads": 4, "kv_heads": 2, "rows": [1, -1, 2, 0]},
            {"counts": [7, 2], "most": 9, "queries": 1, "heads": 2, "kv_heads": 1, "rows": [1], "dtype": "bfloat16"},
            {"counts": [7, 2, 9, 25], "most": 25, "queries": 2, "heads": 2, "kv_heads": 2, "rows": [3, 1, 3, 0, 2]},
        ],
    )


def test_hash_embeddings() -> None:
    check(
        embedding=[
            {"histories": [0, 4, 99], "new": 1, "functions": 1, "sizes": [3, 4, 5, 6, 7, 8], "rows": 5003, "dim": 40},
            {"histories": [0, 1, 2, 7, 8, 9], "new": 3, "functions": 3, "sizes": [1, 3, 8], "rows": 101, "dim": 130},
            {"histories": [8], "new": 1, "functions": 2, "sizes": [4], "rows": 64, "dim": 16, "dtype": "bfloat16"},
        ],
    )


def test_plain_products_are_norm_linear_and_swiglu() -> None:
    torch.manual_seed(0)
    x, norm, residual = torch.randn(3, 8), torch.rand(8) + 0.5, torch.randn(3, 6)
    gate, up = torch.randn(2, 6, 8)
    normed = F.rms_norm(x, (8,), norm, 1e-5)
    found = plain_skinny_linear(x, fold_norm(gate, norm), eps=1e-5, residual_MN=residual, residual_scale=2.0)
    torch.testing.assert_close(found, 2 * residual + normed @ gate.T)
    found = plain_skinny_linear(x, interleaved(fold_norm(gate, norm), fold_norm(up, norm)), gated=True, eps=1e-5)
    torch.testing.assert_close(found, F.silu(normed @ gate.T) * (normed @ up.T))
    torch.testing.assert_close(plain_skinny_linear(x, gate), x @ gate.T)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 32),
    st.sampled_from([None, 1, 5, 9]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)
def test_plain_decode_attention_is_the_models(size: int, window: int | None, heads: tuple[int, int]) -> None:
    """A text step by step, in a ring that holds no more than it must, is the text at once."""
    num_heads, kv_heads = heads
    qkv = torch.randn(size, num_heads + 2 * kv_heads, 8, generator=torch.Generator().manual_seed(size))
    q, k, v = qkv.split([num_heads, kv_heads, kv_heads], dim=1)
    rotary = rotary_embedding(torch.arange(size), 8, 10_000.0)
    mask = build_mask(torch.zeros(size, dtype=torch.long), window)
    expected = mask.attend(rotate(q, rotary), rotate(k, rotary), v)
    caches = torch.zeros(2, 3, window or size, kv_heads, 8)
    table = rotary_embedding(torch.arange(size), 8, 10_000.0)
    options: dict = {"heads": num_heads, "window": window, "row_B": torch.tensor([1])}
    found = [
        plain_decode_attention(qkv[at : at + 1].flatten(1), *caches, torch.tensor([at]), table, **options)
        for at in range(size)
    ]
    torch.testing.assert_close(torch.cat(found), expected.flatten(1))


def test_plain_patch_attention_is_the_models() -> None:
    torch.manual_seed(0)
    sizes = [3, 1, 5]
    q, k, v = torch.randn(3, 2, 4, 8), torch.randn(9, 4, 8), torch.randn(9, 4, 8)
    patch = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    cached, pooled = torch.full((2, 3, 5, 4, 8), torch.nan), torch.full((3, 6), torch.nan)
    h = torch.randn(9, 6)
    for number, row in enumerate(patch.tolist()):
        at = torch.full((3,), -1)
        at[row] = int((patch[:number] == row).sum())
        kv = torch.cat([k[number], v[number]])[None].expand(3, -1, -1)
        plain_append_patch_byte(kv, *cached, at, h_BD=h[number].expand(3, -1), pooled_BD=pooled)
    found = plain_encoder_cross_attention_step(q, *cached, torch.tensor(sizes))
    torch.testing.assert_close(found, encoder_cross_attention(q, k, v, ByteRanges.of(patch, 3)))
    torch.testing.assert_close(pooled, torch.stack([part.amax(0) for part in h.split(sizes)]))

    q, keys, values, read = torch.randn(6, 4, 8), *torch.randn(2, 3, 2, 4, 8), torch.tensor([-1, 0, 2, -1, 1, 1])
    rows = torch.tensor([0, 0, 2, 1, 1, 1])
    found = plain_decoder_cross_attention_step(q, keys, values, read >= 0, row_T=rows)
    torch.testing.assert_close(found, decoder_cross_attention(q, keys, values, ByteRanges.of(read, 3)))


def test_plain_hash_embeddings_are_the_models() -> None:
    torch.manual_seed(0)
    shape = NgramHashSettings(sizes=[3, 5, 8], num_functions=2, vocab_size=997)
    model, own = NgramHashEmbedding(shape, 12), torch.randn(260, 12)
    init_weights(model)
    ids, history = torch.randint(0, 260, (30,)), torch.arange(30) % 17
    expected = own[ids] + model(ids, history)
    tail = F.pad(ids, (7, 0))[None]
    powers = ngram_powers(PRIMES[:2], [3, 5, 8])
    found = plain_hash_embed(tail, history, powers, model.tables.weight.detach(), own, new=30)
    torch.testing.assert_close(found, expected.detach())


@given(st.integers(1, 256), st.integers(1, 12_000), st.integers(1, 12_000), st.booleans())
def test_launches_are_ones_that_compile(M: int, N: int, K: int, gated: bool) -> None:
    launch = launch_for(M, N, K, gated)
    for block in (launch.block_m, launch.block_n, launch.block_k):
        assert block & (block - 1) == 0
    if launch.block_m > 1:
        assert min(launch.block_m, launch.block_n, launch.block_k) >= 16
    assert (launch.block_m == 1) == (M == 1)


def test_splits_only_where_heads_are_few_and_keys_many() -> None:
    assert launch_for_attention(1, 12, 12, 8192).splits > 1
    assert launch_for_attention(64, 12, 12, 8192).splits == 1
    assert launch_for_attention(1, 12, 12, 40).splits == 1


def test_decisions() -> None:
    """Drawing, patch starts, and who may close a patch, of every sampling setting and patching mode."""
    alone = [{"temperature": 1.0, "seed": 5, name: value} for name, value in ACCEPTED.items() if name in OPTIONS]
    every = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 3, "seed": 2},
        {"temperature": 1.3, "top_p": 0.6, "min_p": 0.05, "seed": 3},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.4, "valid_utf8": True, "seed": 4},
    ]
    check(
        deciding=[
            {"rows": 1, "max_closing": 1, "chosen": {"threshold": 3.9}},
            {"rows": 5, "max_closing": 5, "chosen": {"threshold": 3.9, "max_patch_length": 3}, "sampling": every},
            {"rows": 7, "max_closing": 2, "chosen": {"threshold": 0.0, "monotonicity": True}, "sampling": every},
            {"rows": 6, "max_closing": 3, "chosen": {"threshold": 3.8, "threshold_add": 0.1}, "quorum": 0.6},
            {"rows": 9, "max_closing": 9, "chosen": {"threshold": 3.9}, "quorum": 0.45, "decoded": True},
            {"rows": 4, "max_closing": 4, "chosen": {"mode": "space"}, "sampling": every},
            {"rows": 3, "max_closing": 1, "chosen": {"mode": "static", "patch_size": 2}},
            {"rows": 3, "max_closing": 2, "chosen": {"mode": "byte"}},
            {"rows": len(alone), "max_closing": 2, "chosen": {"mode": "byte"}, "sampling": alone},
            {"rows": 5, "max_closing": 5, "chosen": {"mode": "byte"}, "sampling": every[:2], "constrained": True},
        ],
        keeping=[{"rows": 4, "closing": [2, -1, 0], "keys": 3, "heads": 2, "head_dim": 8, "layers": 2}],
        deciding_on_every_id=[
            {"chosen": {**values, "max_patch_length": 3}}
            for values in PATCHINGS.values()
            if not MODES[values["mode"]].on_host
        ],
        gating=[{"rows": 3, "columns": 700}],
    )
