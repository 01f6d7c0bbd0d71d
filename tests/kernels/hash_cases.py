"""What `test_hash_training.py` runs in Triton's interpreter, and anyone on a GPU: the kernels that train hash tables.

    python -m tests.kernels.hash_cases '[["sums", {"T": 40, "N": 3, "rows": 9, "dim": 40}]]'

gives the largest differences from what is expected of each case, as JSON; all of them are 0 or rounding.
"""

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

from bytelatent.kernels.hash_embed import hash_embed, hash_rows, ngram_powers, ngram_rows, row_sums
from bytelatent.kernels.row_adamw import (
    HISTORY,
    TableState,
    catch_up_rows,
    plain_catch_up_rows,
    plain_row_adamw,
    rates_of,
    row_adamw,
    sum_entries,
)
from bytelatent.model.ngram_hash import PRIMES, NgramHashEmbedding
from bytelatent.model.settings import NgramHashSettings
from bytelatent.training.distributed.parallelize import local_part
from bytelatent.training.distributed.sharded_tables import shard_tables
from bytelatent.training.gradients import clip
from bytelatent.training.sparse_rows import SparseRowsAdamW
from tests.kernels.decode_cases import DEVICE, Errors, difference
from tests.model.slow import ngram_hash


def stream(sequences: int, new: int, before: int, sizes: list[int], functions: int, rows: int, dim: int) -> Errors:
    """Whole sequences at once, without zeros in front; histories may reach back further than there are ids."""
    ids = torch.randint(0, 260, (sequences, before + new))
    history = torch.randint(0, 2 * max(sizes), (sequences * new,))
    tables = torch.randn(functions * len(sizes) * rows, dim)
    found = torch.full((sequences * new, functions * len(sizes)), -1)
    powers = ngram_powers(PRIMES[:functions], sizes, DEVICE)
    out = hash_embed(ids, history, powers, tables, None, new=new, rows=found)
    expected = []
    for number, reach in enumerate(history.tolist()):
        sequence, at = ids[number // new].tolist(), before + number % new
        text = [value if at - place <= reach else 0 for place, value in enumerate(sequence)]
        hashes = [ngram_hash(text, at, size, function, rows) for function in range(functions) for size in sizes]
        expected.append([table * rows + value for table, value in enumerate(hashes)])
    expected = torch.tensor(expected, device=found.device)
    alone = ngram_rows(ids, history, powers, len(tables), new=new)
    rows_differ = max(difference(found, expected), difference(alone, expected))
    return {"rows": rows_differ, "error": difference(out, tables[expected].sum(1))}


def sums(T: int, N: int, rows: int, dim: int) -> Errors:
    """Against a product with a matrix of ones. Some rows are seen by all states, most by few."""
    lookups = (rows * torch.rand(T, N) ** 4).long()
    grads = torch.randn(T, dim)
    found = row_sums(lookups, grads, rows)
    counts = F.one_hot(lookups, rows).sum(1).double()
    return {"rows": float(found[counts.sum(0) == 0].any()), "error": difference(found, counts.T @ grads.double())}


def entries(rows: int, lookups: int, dim: int) -> Errors:
    """The entries of a sparse gradient added up, against the dense one; they keep their number."""
    which = (rows * torch.rand(lookups) ** 3).long()
    gradient = torch.sparse_coo_tensor(which[None], torch.randn(lookups, dim), (rows, dim), check_invariants=True)
    found = sum_entries(gradient)
    sorted_rows, values = found._indices()[0], found._values()
    again = torch.cat([which.new_zeros(1, dtype=torch.bool), sorted_rows[1:] == sorted_rows[:-1]])[:lookups]
    return {
        "rows": difference(sorted_rows, which.sort().values) + float(values[again].any()),
        "error": difference(found.to_dense(), gradient.to_dense()),
    }


def update(
    rows: int, lookups: int, dim: int, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0
) -> Errors:
    """Steps that look up some rows, several times; then all rows catch up. A history has wrapped around."""
    step = HISTORY + 7
    rates = [rates_of(step - (step - place) % HISTORY, 0.01, betas, weight_decay) for place in range(HISTORY)]
    rates = torch.tensor(rates)
    last, until = torch.randint(step - 9, step + 1, (rows,)).float(), torch.randint(step - 9, step + 9, (rows,)).float()
    if not weight_decay:
        last = torch.minimum(last, until)
    tensors = [torch.randn(rows, dim), torch.randn(rows, dim), torch.rand(rows, dim) + 1e-4, last, until]
    tensors += [torch.tensor(float(step)), rates]
    table, copy = (TableState(*(x.clone() for x in tensors), betas=tuple(betas), eps=1e-8) for _ in range(2))
    for number in range(3):
        which, grads = torch.randint(rows, (lookups,)).sort().values, torch.randn(lookups, dim)
        for each, caught_up, updated in (
            (table, catch_up_rows, row_adamw),
            (copy, plain_catch_up_rows, plain_row_adamw),
        ):
            if number != 1:  # else the update does it
                caught_up(each, which)
            each.step.add_(1)
            each.rates_HK[int(each.step) % HISTORY] = torch.tensor(rates_of(int(each.step), 0.02, betas, weight_decay))
            updated(each, which, grads)
    catch_up_rows(table)
    plain_catch_up_rows(copy, None)
    names = "weight", "mean", "square", "rows", "rows"
    errors: Errors = {}
    for name, one, other in zip(names, table.tensors, copy.tensors, strict=False):
        errors[name] = max(errors.get(name, 0.0), difference(one, other))
    return errors


def steps(size: int, dim: int, rows: int, sharded: bool = False, weight_decay: float = 0.0) -> Errors:
    """Tables trained by rows, through a look-up, its gradient, clipping and AdamW, against dense ones in float64.

    Args:
        sharded: as one of several ranks does, of which this is the only one.
    """
    table_settings = NgramHashSettings(sizes=[2, 3], num_functions=1, vocab_size=rows)
    model, exact = NgramHashEmbedding(table_settings, dim), NgramHashEmbedding(table_settings, dim).double()
    torch.nn.init.normal_(model.tables.weight)
    exact.load_state_dict(model.state_dict())
    if sharded:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo", store=store, rank=0, world_size=1)
        shard_tables(model, DEVICE, 1)
    weight, exact_weight = model.tables.weight, exact.tables.weight
    model.tables.sparse = True
    patching: dict = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = SparseRowsAdamW([weight], **patching)
    optimizer.before_lookups(model)
    expected = torch.optim.AdamW([exact_weight], foreach=False, **patching)
    errors: Errors = {}
    for step in range(5):
        ids, history = torch.randint(0, 5 + step % 2, (size,)), torch.arange(size)
        found, wanted, grads = model(ids, history), exact_sums(exact, ids), torch.randn(size, dim)
        found.backward(grads)
        wanted.backward(grads.double())
        norms = clip(model.parameters(), 1.0, num_passes=1), clip(exact.parameters(), 1.0)
        for each in (optimizer, expected):
            each.step()
            each.zero_grad()
        both = {"output": (found, wanted), "norm": norms}
        errors |= {name: max(errors.get(name, 0.0), difference(*pair)) for name, pair in both.items()}
    optimizer.catch_up()
    if sharded:
        dist.destroy_process_group()
    return errors | {"weight": difference(local_part(weight.detach()), exact_weight.detach())}


def exact_sums(exact: NgramHashEmbedding, ids: torch.Tensor) -> torch.Tensor:
    """By indexing, not by kernels, which compute in float32."""
    powers = exact.powers(ids.device)
    rows = hash_rows(
        ids[None].cpu(), torch.arange(len(ids), device="cpu"), powers.cpu(), len(exact.tables.weight) // 2, len(ids)
    )
    return exact.tables.weight[rows.to(ids.device)].sum(1)


CASES = {"stream": stream, "sums": sums, "entries": entries, "update": update, "steps": steps}


def run(cases: list[tuple[str, dict]]) -> list[dict]:
    torch.manual_seed(0)
    return [CASES[name](**arguments) for name, arguments in cases]


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    print(json.dumps(run(json.loads(sys.argv[1]))))
