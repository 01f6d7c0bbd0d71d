"""AdamW for tables of which a step sees few rows."""

import torch
from torch.optim.optimizer import ParamsT

from bytelatent.kernels.hash_tables import coalesced, row_adamw

# Shapes: R rows of a table, U rows seen, D width


class SparseRowsAdamW(torch.optim.Optimizer):
    """AdamW that touches only the rows seen: those of the gradient, which is a sparse tensor of rows.

    Each row is trained as `torch.optim.AdamW` would train it alone in the steps that saw it, as if there had been no
    others. AdamW over the whole table differs in the steps that do not see a row: there it lets the row's moments fade
    and goes on moving the row by what is left of them, and it decays the row's weights. And its correction of the
    moments counts all steps, so that it starts slowly with a row that comes late.

    The moments are as large as the table.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for table_RD in group["params"]:
                if table_RD.grad is None:
                    continue
                assert table_RD.grad.is_sparse, "the gradient is dense"
                state = self.state[table_RD]
                if not state:
                    # In floats, which count exactly to 2^24, as a state that is loaded is made the table's dtype.
                    state["seen"] = table_RD.new_zeros(table_RD.shape[0])
                    state["exp_avg"] = torch.zeros_like(table_RD)
                    state["exp_avg_sq"] = torch.zeros_like(table_RD)
                gradient = coalesced(table_RD.grad)
                rows_U = gradient.indices()[0]
                count_U = state["seen"][rows_U] + 1
                state["seen"][rows_U] = count_U
                row_adamw(
                    table_RD,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    rows_U,
                    gradient.values(),
                    count_U,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
