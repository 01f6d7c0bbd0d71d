"""What `test_hash_training.py` runs in Triton's interpreter, and anyone on a GPU: the kernels that train hash tables.

    python -m tests.kernels.hash_cases '[["sums", {"T": 40, "N": 3, "rows": 9, "dim": 40}]]'

gives the largest differences from what is expected of each case, as JSON; all of them are 0 or rounding.
"""

import json
import sys

import torch
import torch.nn.functional as F

from bytelatent.kernels.hash_embed import hash_embed, ngram_powers, plain_row_adamw, row_adamw, row_sums
from bytelatent.model.ngram_hash import PRIMES
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
    return {"rows": difference(found, expected), "error": difference(out, tables[expected].sum(1))}


def sums(T: int, N: int, rows: int, dim: int) -> Errors:
    """Against a product with a matrix of ones. Some rows are seen by all states, most by few."""
    lookups = (rows * torch.rand(T, N) ** 4).long()
    grads = torch.randn(T, dim)
    found = row_sums(lookups, grads, rows)
    counts = F.one_hot(lookups, rows).sum(1).double()
    return {"rows": float(found[counts.sum(0) == 0].any()), "error": difference(found, counts.T @ grads.double())}


def update(rows: int, seen: int, dim: int, weight_decay: float = 0.0) -> Errors:
    """Rows that are not seen stay as they are."""
    tables = [torch.randn(rows, dim), torch.randn(rows, dim), torch.rand(rows, dim)]
    copies = [table.clone() for table in tables]
    which = torch.randperm(rows)[:seen].sort().values
    rest = (which, torch.randn(seen, dim), torch.randint(1, 9, (seen,)))
    given: dict = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    row_adamw(*tables, *rest, **given)
    plain_row_adamw(*copies, *rest, **given)
    return {name: difference(*both) for name, *both in zip(("weight", "mean", "square"), tables, copies, strict=True)}


CASES = {"stream": stream, "sums": sums, "update": update}


def run(cases: list[tuple[str, dict]]) -> list[dict]:
    torch.manual_seed(0)
    return [CASES[name](**arguments) for name, arguments in cases]


if __name__ == "__main__":
    torch.set_default_device(DEVICE)
    print(json.dumps(run(json.loads(sys.argv[1]))))
