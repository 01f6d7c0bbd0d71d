"""Hash tables in training: the kernels in Triton's interpreter, their plain twins, and the operator around them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from bytelatent.kernels import hash_embed, row_adamw
from bytelatent.kernels.hash_embed import hash_rows, ngram_powers, plain_row_sums, row_sums
from bytelatent.kernels.row_adamw import sum_entries
from bytelatent.model.block import init_weights
from bytelatent.model.ngram_hash import PRIMES, NgramHashEmbedding
from bytelatent.model.settings import NgramHashSettings
from tests.kernels.interpreter import interpreted


def check(**cases_of: list[dict]) -> None:
    """Run cases of `hash_cases.py`."""
    named = [(name, case) for name, cases in cases_of.items() for case in cases]
    for (_, case), errors in zip(named, interpreted("tests.kernels.hash_cases", named), strict=True):
        assert errors.get("rows", 0) == 0, (case, errors)
        assert max(errors.values()) < 3e-5, (case, errors)


def test_kernels() -> None:
    pytest.importorskip("triton")
    check(
        stream=[
            {"sequences": 1, "new": 30, "before": 0, "sizes": [3, 5, 8], "functions": 1, "rows": 997, "dim": 24},
            {"sequences": 3, "new": 4, "before": 2, "sizes": [1, 4], "functions": 3, "rows": 64, "dim": 130},
            {"sequences": 1, "new": 1, "before": 0, "sizes": [2], "functions": 1, "rows": 5, "dim": 8},
        ],
        sums=[
            {"T": 200, "N": 2, "rows": 30, "dim": 24},  # rows of up to 180 states
            {"T": 30, "N": 3, "rows": 50, "dim": 130},
            {"T": 1, "N": 1, "rows": 3, "dim": 16},
            {"T": 20, "N": 1, "rows": 1, "dim": 7},
            {"T": 0, "N": 2, "rows": 3, "dim": 16},
        ],
        update=[
            {"rows": 9, "lookups": 5, "dim": 40},
            {"rows": 4, "lookups": 9, "dim": 1030, "betas": [0.0, 0.9]},
            {"rows": 4, "lookups": 0, "dim": 8},
            {"rows": 12, "lookups": 5, "dim": 40, "weight_decay": 4.0},
        ],
        steps=[
            {"size": 12, "dim": 24, "rows": 31},
            {"size": 12, "dim": 24, "rows": 31, "sharded": True, "weight_decay": 2.0},
        ],
        entries=[
            {"rows": 9, "lookups": 40, "dim": 24},
            {"rows": 50, "lookups": 30, "dim": 130},
            {"rows": 3, "lookups": 0, "dim": 8},
        ],
    )


def test_kernels_compile_for_a_gpu() -> None:
    """Which the interpreter does not tell; it takes no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    table = dict.fromkeys(("weight", "mean", "square", "last", "until", "step", "rates", "grads"), "*fp32")
    numbers = dict.fromkeys(("rest1", "beta2", "rest2", "eps", "log_beta1", "log_beta2"), "fp32") | {"lasting": "i32"}
    ids = dict.fromkeys(("tail", "history", "powers", "rows", "order", "end", "run"), "*i64")
    table["tables"] = table["embedding"] = "*fp32"
    types = {f"{name}_ptr": kind for name, kind in (table | ids | {"out": "*fp32"}).items()}
    types |= numbers | {"S": "i32", "L": "i32", "N": "i32"}
    blocks: dict[str, Any] = {"D": 384, "BLOCK": 512}
    hashes: dict[str, Any] = {"N": 6, "PADDED_N": 8, "W": 8, "PADDED_W": 8, "V": 97, "OVERLAP": True}
    absent = dict.fromkeys(("tables_ptr", "embedding_ptr", "out_ptr", "run_ptr"))
    for kernel, constants in (
        (row_adamw.row_adamw_kernel, {"HISTORY": 256, "K": 2}),
        (row_adamw.row_adamw_kernel, {"HISTORY": 256, "K": 3}),
        (row_adamw.row_adamw_catch_up_kernel, {"HISTORY": 256, "K": 2}),
        (row_adamw.row_adamw_catch_up_kernel, {"HISTORY": 256, "K": 3}),
        (row_adamw.row_adamw_catch_up_kernel, {"HISTORY": 256, "K": 2, "rows_ptr": None}),
        (row_adamw.row_adamw_catch_up_kernel, {"HISTORY": 256, "K": 3, "rows_ptr": None}),
        (hash_embed.row_sums_kernel, {"AT_ROWS": False}),
        (hash_embed.row_sums_kernel, {"AT_ROWS": True}),
        (hash_embed.hash_embed_kernel, hashes),
        (hash_embed.hash_embed_kernel, hashes | absent),
    ):
        constants = blocks | constants
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        assert "cubin" in triton.compile(source, GPUTarget("cuda", 90, 32)).asm


def embedding_and_stream(size: int, dtype: torch.dtype = torch.float64) -> tuple[NgramHashEmbedding, Tensor, Tensor]:
    torch.manual_seed(size)
    model = NgramHashEmbedding(NgramHashSettings(sizes=[2, 3, 5], num_functions=2, vocab_size=29), 12).to(dtype)
    init_weights(model)
    return model, torch.randint(0, 9, (size,)), torch.randint(0, 7, (size,))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.booleans())
def test_the_gradient_is_autograds(size: int, sparse: bool) -> None:
    model, ids, history = embedding_and_stream(size)
    model.tables.sparse = sparse
    weight, grads = model.tables.weight, torch.randn(size, 12, dtype=torch.float64)
    rows = hash_rows(ids[None], history, ngram_powers(PRIMES[:2], [2, 3, 5]), 29, new=size)
    copy = weight.detach().clone().requires_grad_()
    expected = copy[rows].sum(1)
    expected.backward(grads)
    found = model(ids, history)
    torch.testing.assert_close(found, expected)
    found.backward(grads)
    assert weight.grad is not None
    assert copy.grad is not None
    torch.testing.assert_close(weight.grad.to_dense(), copy.grad)
    assert weight.grad.is_sparse == sparse
    if sparse:
        assert weight.grad._nnz() == rows.numel()
        torch.testing.assert_close(weight.grad._values().norm(), copy.grad.norm())  # of one pass: no row in two entries
        once = sum_entries(weight.grad)
        assert sum_entries(once) is once
        assert once._indices()[0].tolist() == sorted(rows.flatten().tolist())
        torch.testing.assert_close(once.to_dense(), copy.grad)
        model(ids, history).backward(grads)
        torch.testing.assert_close(weight.grad.to_dense(), 2 * copy.grad)
        torch.testing.assert_close(sum_entries(weight.grad)._values().norm(), 2 * copy.grad.norm())


@pytest.mark.parametrize("sparse", [False, True])
def test_one_graph(sparse: bool) -> None:
    """Whole, under torch.compile, whatever rows there happen to be."""
    model, ids, history = embedding_and_stream(40, torch.float32)
    model.tables.sparse = sparse
    weight, gradients, outputs = model.tables.weight, [], []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = torch.randn(40, 12)
    for run in (model, compiled):
        outputs.append(run(ids, history))
        outputs[-1].backward(grads)
        assert weight.grad is not None
        assert weight.grad.is_sparse == sparse
        gradients.append(weight.grad)
        weight.grad = None
    assert torch.equal(*outputs)
    assert torch.equal(*(gradient.to_dense() for gradient in gradients))


def test_the_operators_are_what_they_describe() -> None:
    model, ids, history = embedding_and_stream(20, torch.float32)
    for sparse in (False, True):
        arguments = (ids[None], history, model.powers(ids.device), model.tables.weight, 20, sparse)
        library.opcheck(torch.ops.bytelatent.ngram_sums.default, arguments)
    library.opcheck(torch.ops.bytelatent.row_sums.default, (torch.randint(0, 9, (7, 2)), torch.randn(7, 3), 9))
    library.opcheck(torch.ops.bytelatent.entry_sums.default, (torch.randint(0, 9, (7, 2)), torch.randn(7, 3)))


def test_states_stay_in_float32_under_autocast() -> None:
    model, ids, history = embedding_and_stream(20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids, history).dtype == torch.float32


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), max_size=12))
def test_row_sums(lookups: list[list[int]]) -> None:
    rows = torch.tensor(lookups, dtype=torch.long).view(-1, 2)
    grads = torch.arange(len(rows) * 3.0).view(-1, 3)
    for form in (row_sums, plain_row_sums):
        expected = [[0.0] * 3 for _ in range(6)]
        for state, row in [(state, row) for state, pair in enumerate(lookups) for row in pair]:
            expected[row] = [x + y for x, y in zip(expected[row], grads[state].tolist(), strict=True)]
        assert form(rows, grads, 6).tolist() == expected
