"""Hash tables whose gradients are by rows, divided among processes, against one process with dense gradients."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bytelatent.errors import UserError
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.model.settings import NgramHashSettings
from bytelatent.training import read_metrics
from bytelatent.training.checks import check_settings
from bytelatent.training.distributed import sharded_tables
from bytelatent.training.distributed.ranks import open_ranks
from bytelatent.training.distributed.sharded_tables import fill_from_first, shard_tables, table_on_first, zero_per_row
from bytelatent.training.gradients import clip
from bytelatent.training.sparse_rows import SparseRowsAdamW
from tests.training.crew import Crew
from tests.training.plans import Taken, take_steps, train_as, values
from tests.training.tiny_runs import assert_equal_runs, checkpoints, losses, settings

TABLES = "encoder.ngram_hash.tables.weight"
OPTIMIZER = {"lr": 3e-3, "warmup_steps": 0, "clip": 0.5, "beta2": 0.9, "hash_weight_decay": 20.0}
ROWS = {"optimizer": {**OPTIMIZER, "hash_gradients": "rows"}}
PLANS = {  # beside FSDP on two ranks
    "replicate": (2, {"data": "replicate"}),
    "tensor": (2, {"tensor": 2}),
    "hybrid": (4, {"data": "hybrid", "replicas": 2}),  # more ranks than tables
}
STEPS = 4


def same_steps(taken: Taken, expected: Taken) -> None:
    """Losses, norms of gradients before clipping, and final tables to 1e-5, in float32."""
    assert [row["step"] for row in taken.rows] == [row["step"] for row in expected.rows[-len(taken.rows) :]]
    for row, wanted in zip(taken.rows, expected.rows[-len(taken.rows) :], strict=True):
        assert row["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-5)
        assert row["gradient_norm"] > OPTIMIZER["clip"]
    torch.testing.assert_close(taken.weights[TABLES], expected.weights[TABLES], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def dense(text: Path) -> Taken:
    """Of one process, by torch's AdamW."""
    return take_steps(values(text, optimizer=OPTIMIZER), STEPS)


def test_steps_of_several_processes_are_those_of_one(crew: Crew, text: Path, dense: Taken) -> None:
    for names in (["replicate", "tensor"], ["hybrid"]):
        jobs = [(PLANS[name][0], take_steps, values(text, **ROWS, parallel=PLANS[name][1]), STEPS) for name in names]
        for [first, *others] in crew.run(*jobs):
            same_steps(first, dense)
            expected = dense.gradients[TABLES]
            torch.testing.assert_close(first.gradients[TABLES], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
            for rank in others:  # bit for bit among themselves
                assert rank.rows == first.rows
                assert all(torch.equal(rank.weights[name], weight) for name, weight in first.weights.items())
            assert sum(rank.held[TABLES][0] for rank in (first, *others)) == len(expected)


def test_a_checkpoint_goes_on_in_another_number_of_processes(
    crew: Crew, tmp_path: Path, text: Path, dense: Taken
) -> None:
    given = values(text, **ROWS)
    take_steps(given, 2, tmp_path / "of one")
    crew.run((2, take_steps, given, 2, tmp_path / "of two"))
    one_to_two, two_to_one = (
        crew.run((2, take_steps, given, STEPS, tmp_path / "of one"))[0][0],
        take_steps(given, STEPS, tmp_path / "of two"),
    )
    for taken in (one_to_two, two_to_one):
        assert len(taken.rows) == STEPS - 2
        same_steps(taken, dense)


def test_a_run_that_is_cut_off_goes_on_bit_for_bit(crew: Crew, tmp_path: Path, text: Path) -> None:
    """And is, in all its metrics, the run with dense gradients."""
    more: dict[str, Any] = {"data": {"valid": str(text)}, "validation": {"every": 4, "max_bytes": 450}}
    more |= {"statistics_every": 4, "steps": 8}
    whole, cut, of_dense = (tmp_path / name for name in ("whole", "cut", "dense"))
    crew.run((2, train_as, values(text, whole, **ROWS, **more)), (2, train_as, values(text, cut, **ROWS, **more), 6))
    assert checkpoints(cut) == ["step-00000005"]
    crew.run(
        (2, train_as, values(text, cut, **ROWS, **more)),
        (2, train_as, values(text, of_dense, optimizer=OPTIMIZER, **more)),
    )
    assert_equal_runs(cut, whole)
    for row, expected in zip(losses(whole), losses(of_dense), strict=True):
        assert row == (*row[:2], *(value and pytest.approx(value, rel=1e-5) for value in expected[2:]))
    statistics = [
        [row for row in read_metrics(run / "metrics.jsonl") if row.get("kind") == "statistics"]
        for run in (whole, of_dense)
    ]
    assert len(statistics[0]) == 2
    for row, expected in zip(*statistics, strict=True):
        assert row["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=1e-4)
        assert "encoder.ngram_hash.tables" in row["gradient_norms"]


def whole_embedding(num_rows: int) -> NgramHashEmbedding:
    torch.manual_seed(num_rows)
    embedding = NgramHashEmbedding(NgramHashSettings(sizes=[2, 3], num_functions=1, vocab_size=num_rows), 4)
    nn.init.normal_(embedding.tables.weight)
    return embedding.double()


def batches(world: int, step: int) -> list[Tensor]:
    """Ids of each rank: of different sizes, and in turn of none."""
    draw = torch.Generator().manual_seed(step)
    return [
        torch.randint(0, 9, [0 if rank == step % (world + 1) else 3 + 2 * rank], generator=draw)
        for rank in range(world)
    ]


def loss_of(embedding: NgramHashEmbedding, ids: Tensor) -> Tensor:
    return embedding(ids, torch.arange(len(ids))).square().sum()


def steps_by_rows(num_rows: int, loaded: bool, decay: float) -> tuple[list[float], Tensor | None]:
    """Norms before clipping, and on the first rank the table after some steps.

    Args:
        loaded: from an earlier version's state.
    """
    whole = whole_embedding(num_rows)
    with open_ranks("cpu", 1) as (ranks, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_tables, "PIECE", 4)
        table = whole.tables.weight.detach().clone()
        weight: Any = shard_tables(whole, "cpu", ranks.world_size)
        fill_from_first(weight.detach(), table if ranks.is_first else None)
        whole.tables.sparse = True
        optimizer = SparseRowsAdamW([weight], lr=0.05, betas=(0.7, 0.9), eps=1e-6, weight_decay=decay)
        optimizer.before_lookups(whole)
        if loaded:
            state = {"exp_avg": torch.zeros_like(weight.detach()), "exp_avg_sq": torch.zeros_like(weight.detach())}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state | {"seen": zero_per_row(weight)}}})
        norms = []
        for step in range(8):
            for _ in range(1 + step % 2):
                loss_of(whole, batches(ranks.world_size, step)[ranks.rank]).backward()
            norms.append(float(clip([weight], 20.0)))
            optimizer.step()
            optimizer.zero_grad()
            if step == 4:  # as a run that rolls back does, in place
                optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        optimizer.catch_up()
        found = table_on_first(weight)
        assert (found is not None) == ranks.is_first
        return norms, found


@pytest.mark.parametrize(
    ("num_rows", "world", "loaded", "decay"),
    [(31, 2, False, 0.0), (31, 2, True, 0.0), (31, 2, True, 0.1), (1, 4, False, 0.0)],
)
def test_ranks_without_ids_or_rows(crew: Crew, num_rows: int, world: int, loaded: bool, decay: float) -> None:
    """In float64, against torch's AdamW on the whole table: none waits for another, and no gradient is lost."""
    jobs = crew.run((world, steps_by_rows, num_rows, loaded, decay))[0]
    embedding = whole_embedding(num_rows)
    table = embedding.tables.weight
    adam = torch.optim.AdamW([table], lr=0.05, betas=(0.7, 0.9), eps=1e-6, weight_decay=decay)
    for step, norm in enumerate(jobs[0][0]):
        adam.zero_grad()
        for ids in batches(world, step) * (1 + step % 2):
            (loss_of(embedding, ids) / world).backward()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_([table], 20.0)), rel=1e-9)
        adam.step()
    assert max(jobs[0][0]) > 20 > min(jobs[0][0])
    assert all(norms == jobs[0][0] for norms, _ in jobs)
    torch.testing.assert_close(jobs[0][1], table.detach(), rtol=1e-9, atol=1e-9)


def test_tables_that_are_gathered_have_no_gradients_by_rows(text: Path) -> None:
    asked = settings(values(text, **ROWS, parallel={"tables": "gather"}))
    check_settings(asked, 1, torch.device("cpu"))
    check_settings(settings(values(text, **ROWS)), 2, torch.device("cpu"))
    line = (
        r"^optimizer\.hash_gradients: rows of 2 processes need .*, not parallel\.tables=gather; take parallel\.tables="
    )
    with pytest.raises(UserError, match=line):
        check_settings(asked, 2, torch.device("cpu"))
