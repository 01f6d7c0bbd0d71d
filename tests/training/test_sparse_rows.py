"""AdamW by rows against torch's over whole tables; its state, and states of before."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from bytelatent.kernels import row_adamw as kernels
from bytelatent.kernels.row_adamw import HISTORY, lasting_steps
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.model.settings import NgramHashSettings
from bytelatent.training.sparse_rows import SparseRowsAdamW
from tests.training.test_gradients import META, NoneFromValues, unasked

PATCHING: dict[str, Any] = {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-6}


def sparse_gradient(rows: list[int], shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Random, of these rows in this order; a row that comes twice has the sum of both."""
    values = torch.randn(len(rows), shape[1], dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.long), values, shape, check_invariants=True)


class Both:
    """A table trained by rows, and the same one densely by torch."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype = torch.float64, **patching: Any):
        torch.manual_seed(shape[0])
        self.table = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.dense = nn.Parameter(self.table.detach().clone())
        given: dict[str, Any] = {"weight_decay": 0.0} | PATCHING | patching
        self.rows = SparseRowsAdamW([self.table], **given)
        self.torchs = torch.optim.AdamW([self.dense], **given)

    def read(self, rows: list[int]) -> float:
        """The largest difference in these rows, as a batch reads them."""
        self.rows.catch_up(self.table, torch.tensor(sorted(rows), dtype=torch.long))
        return float((self.table - self.dense).detach()[rows].abs().max()) if rows else 0.0

    def step(self, rows: list[int], lr: float | None = None, size: float = 1.0) -> float:
        """Read, and change; the largest difference before and after."""
        before = self.read(rows)
        self.table.grad = size * sparse_gradient(rows, tuple(self.table.shape), self.table.dtype)  # type: ignore[arg-type]
        self.dense.grad = self.table.grad.to_dense()
        for optimizer in (self.rows, self.torchs):
            for group in optimizer.param_groups:
                group["lr"] = lr or group["lr"]
            optimizer.step()
        return max(before, float((self.table - self.dense).detach()[rows].abs().max()) if rows else 0.0)


@pytest.mark.parametrize(
    ("dtype", "bound", "weight_decay"),
    [(torch.float64, 1e-12, 0.0), (torch.float32, 1e-6, 0.0), (torch.float64, 1e-12, 0.4)],
    ids=["float64", "float32", "float64 with weight decay"],
)
def test_it_is_dense_adamw_whatever_rows_miss(dtype: torch.dtype, bound: float, weight_decay: float) -> None:
    """Rows that are looked up every 1 to 400 steps, or once, or never, through a warm-up and a decay of the rate."""
    both = Both((13, 3), dtype, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    begin = both.table.detach().clone()
    every = [1, 2, 3, 7, 20, 64, 100, 255, 256, 257, 400, 10**6]
    worst = 0.0
    for step in range(1, 1001):
        rows = [row for row, period in enumerate(every) if step % period == 0 or step == 5]
        lr = 0.01 * min(step / 50, 1.0) * (1 - step / 1200)
        worst = max(worst, both.step([*rows, rows[0]], lr, 10.0 ** -(step % 7)))
    assert worst < bound
    assert both.read(list(range(13))) < bound
    left = (both.dense.detach() / begin)[12]  # of a row that only shrinks
    assert torch.all(left < 0.2 if weight_decay else left == 1)


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.95, 0.9), (0.9, 0.999), (0.5, 0.3)])
@pytest.mark.parametrize(("eps", "weight_decay"), [(1e-8, 0.0), (0.1, 0.0), (1e-8, 0.02)])
def test_for_other_betas(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Also where the root of the square fades faster than the mean, so that a row moves on and on."""
    both = Both((3, 2), betas=betas, eps=eps, weight_decay=weight_decay)
    worst = max(both.step([0] if step % 97 else [0, 1, 2]) for step in range(1, 300))
    assert worst < 1e-9 * float(both.dense.detach().abs().max())
    assert float(both.dense.detach().abs().max()) > 1


@examples(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=12), st.sampled_from([0.0, 3.0]))
def test_any_steps(steps: list[list[int]], weight_decay: float) -> None:
    both = Both((5, 3), weight_decay=weight_decay)
    assert all(both.step(rows) < 1e-12 for rows in steps)
    both.rows.catch_up()
    torch.testing.assert_close(both.table, both.dense)


def test_where_every_row_is_seen_it_is_adamw() -> None:
    both = Both((7, 5))
    for _ in range(8):
        both.step([*torch.randperm(7).tolist(), 3, 3, 1])
    torch.testing.assert_close(both.table, both.dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.95)])
def test_the_steps_left_out_are_below_rounding(dtype: torch.dtype, betas: tuple[float, float]) -> None:
    """From the worst moments there can be: the gradients that bring the mean closest to its bound."""
    ratio, steps = betas[0] / betas[1], 20_000
    powers = torch.arange(steps, dtype=torch.float64)
    grads = ratio**powers  # the i-th before the last one: of Cauchy and Schwarz's equality
    mean = float((grads * betas[0] ** powers).sum() * (1 - betas[0]))
    root = float((grads**2 * betas[1] ** powers).sum() * (1 - betas[1])) ** 0.5
    left_out = betas[0] / betas[1] ** 0.5
    moves = mean / root * left_out ** (powers + 1)
    lasting = lasting_steps(betas, dtype)
    assert float(moves[lasting:].sum()) <= torch.finfo(dtype).eps / 2
    assert float(moves[lasting - 3 :].sum()) > torch.finfo(dtype).eps / 2
    assert lasting_steps((0.9, 0.95), torch.float32) == 242


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_how_a_row_catches_up_changes_no_bit(weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one go or in parts, alone or with others: so a run that saves more often is the same."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "CACHED", 70)
    gradients = {step: sparse_gradient([step % 5, 5 + step % 31], (36, 7), torch.float32) for step in range(1, 300)}
    tables = []
    for every in (10**6, 1, 9):
        torch.manual_seed(1)
        table = nn.Parameter(torch.randn(36, 7))
        optimizer = SparseRowsAdamW([table], lr=0.01, betas=(0.9, 0.95), weight_decay=weight_decay)
        for step, gradient in gradients.items():
            if step % every == 0:
                optimizer.catch_up()
            table.grad = gradient
            optimizer.step()
        optimizer.catch_up()
        tables.append((table.detach(), optimizer.state[table]))
    for table, state in tables[1:]:
        assert torch.equal(table, tables[0][0])
        assert all(torch.equal(value, tables[0][1][key]) for key, value in state.items())


def restored(optimizer: SparseRowsAdamW, copy: nn.Parameter) -> SparseRowsAdamW:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = SparseRowsAdamW([copy], lr=9.0)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return other


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("before", [2, HISTORY + 5])
def test_its_state_is_all_it_needs(before: int, weight_decay: float) -> None:
    both = Both((6, 4), torch.float32, weight_decay=weight_decay)
    rows = [[0, 3, 3], [5, 0], [3], [], [0, 1, 2, 3]]
    for step in range(before):
        both.step(rows[step % 5])
    copy = nn.Parameter(both.table.detach().clone())
    other = restored(both.rows, copy)
    for step in range(7):
        both.step(rows[step % 5])
        copy.grad = both.table.grad
        other.step()
    assert torch.equal(both.table, copy)


def test_a_loaded_state_lies_where_the_last_one_lay() -> None:
    """A CUDA graph reads it there."""
    both = Both((6, 4))
    both.step([1, 2])
    state = dict(both.rows.state[both.table])
    earlier = {key: value.clone() for key, value in state.items()}
    saved = io.BytesIO()
    torch.save(both.rows.state_dict(), saved)
    both.step([2, 3])
    both.rows.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for key, value in both.rows.state[both.table].items():
        assert value is state[key]
        assert torch.equal(value, earlier[key])


@pytest.mark.parametrize("of", ["counted rows", "dense AdamW"])
def test_a_state_of_another_adamw(of: str) -> None:
    """Nothing is left to make up for; from then on it is dense AdamW."""
    both = Both((4, 2))
    for _ in range(9):
        both.dense.grad = torch.randn(4, 2).double()
        both.torchs.step()
    with torch.no_grad():
        both.table.copy_(both.dense)
    stored = {key: value.clone() for key, value in both.torchs.state[both.dense].items()}
    if of == "counted rows":
        del stored["step"]
        stored["seen"] = torch.tensor([1.0, 9.0, 3.0, 0.0]).double()
    numbered = both.rows.state_dict()
    both.rows.load_state_dict({**numbered, "state": {0: stored}})
    worst = max(both.step([step % 4, 0]) for step in range(30))
    assert worst < 1e-12


@pytest.mark.parametrize("before", [3, 2 * HISTORY + 40])
def test_weight_decay_begins_and_ends_with_a_loaded_state(before: int) -> None:
    """Nothing decays in the steps before, also in those that rows have yet to make up for; nor after."""
    both = Both((6, 4))
    for step in range(before + 500):
        if step in (before, before + 300):
            decay = 0.1 if step == before else 0.0
            if not decay:
                both.rows.catch_up()
            other = SparseRowsAdamW([both.table], weight_decay=decay, **PATCHING)
            other.load_state_dict({**other.state_dict(), "state": both.rows.state_dict()["state"]})
            both.rows, both.torchs.param_groups[0]["weight_decay"] = other, decay
        assert both.step([step % 2, 2 + step // 256 % 2, *([4] * (step == 0))]) < 1e-12
    assert both.read(list(range(6))) < 1e-12
    assert both.rows.state[both.table]["rates"].shape == (HISTORY, 2)


class Counted:
    """In place of a kernel."""

    def __init__(self) -> None:
        self.launches: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: self.launches.append(grid[0])


@contextmanager
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """On the meta device all as on CUDA, but that no kernel runs."""
    import bytelatent.kernels.hash_embed as hashes

    made = Counted()
    with monkeypatch.context() as patch:
        for module, names in (
            (kernels, ["row_adamw_kernel", "row_adamw_catch_up_kernel"]),
            (hashes, ["row_sums_kernel", "hash_embed_kernel"]),
        ):
            patch.setattr(module, "uses_kernels", lambda x: True)
            for name in names:
                patch.setattr(module, name, made)
        yield made


def test_nothing_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither before a look-up, which a CUDA graph holds, nor in a step; all sizes hang on the batch's alone."""
    with META:
        embedding = NgramHashEmbedding(NgramHashSettings(sizes=[2, 3], num_functions=1, vocab_size=29), 12)
    embedding.tables.sparse = True
    optimizer = SparseRowsAdamW(embedding.parameters(), **PATCHING)
    optimizer.before_lookups(embedding)
    ids, history = torch.zeros(50, dtype=torch.long, device=META), torch.zeros(50, dtype=torch.long, device=META)
    with without_kernels(monkeypatch) as made:
        embedding.powers(META)
        optimizer._done[embedding.tables.weight] = 0  # known since the first step
        for _ in range(2):
            with unasked():
                found = embedding(ids, history)
            with NoneFromValues():  # the other mode makes sparse tensors without entries
                found.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    # The rows of 50 ids, and 100 catch up (the operators of sums run none here); 100 change.
    assert made.launches == [50, 100, 100] * 2
