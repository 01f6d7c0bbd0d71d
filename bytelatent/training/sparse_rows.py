"""AdamW for hash tables whose gradients hold only the rows that a step looks up."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bytelatent.kernels.row_adamw import (
    HISTORY,
    TableState,
    catch_up_rows,
    lasting_steps,
    rates_of,
    row_adamw,
    sum_entries,
)
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.training.distributed.parallelize import full_tensor, local_part
from bytelatent.training.distributed.sharded_tables import first_row, zero_per_row

# Shapes: R rows of a table, D width, M lookups


class SparseRowsAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` for gradients that are sparse tensors of rows.

    AdamW moves every row in every step, also one without a gradient, by its momentum and by weight decay. Here a row
    misses the steps that do not look it up; these are made up for before it is next read, see `before_lookups`. So what
    the model reads, and each update, is as of AdamW with dense gradients, but for rounding. Between its look-ups a row
    lies behind: call `catch_up` before the whole table is read, as before it is saved. That changes no later result,
    not by a bit.

    The moments are as large as the table. Of a row-sharded table each rank has the state of its rows and changes these;
    rows are numbered as in the whole table.

    A state of the earlier version of this class, which counted for each row the steps that looked it up (`seen`), is
    loaded as if all rows had caught up.
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
        self._done: dict[Tensor, int] = {}  # the number of steps done, which the host need not ask for

    def before_lookups(self, embedding: NgramHashEmbedding) -> None:
        """From now on bring the rows that it looks up up to date, before it reads them.

        That is part of its forward pass, so a CUDA graph holds it, and the state stays where it is in memory.
        """
        table_RD = embedding.tables.weight
        embedding.before_lookup = lambda rows_M: self.catch_up(table_RD, rows_M)

    @torch.no_grad()
    def catch_up(self, table_RD: Tensor | None = None, rows_M: Tensor | None = None) -> None:
        """Make up for the steps that rows missed: sorted rows of a table; or all of one table, or of all."""
        for own_RD, group in self._tables():
            if table_RD is None or own_RD is table_RD:
                catch_up_rows(self._state(own_RD, group), None if rows_M is None else _held(own_RD, rows_M))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the gradients are there already"
        for table_RD, group in self._tables():
            if table_RD.grad is None:
                continue
            assert table_RD.grad.layout is torch.sparse_coo, "the gradient is dense"
            gradient = sum_entries(table_RD.grad)
            table = self._state(table_RD, group)
            if table_RD not in self._done:
                self._done[table_RD] = int(table.step)
            self._done[table_RD] = step = self._done[table_RD] + 1
            table.step.fill_(step)  # fills are kernels: copies from the host would wait
            rates_K = rates_of(step, group["lr"], group["betas"], group["weight_decay"])
            for place, rate in zip(table.rates_HK[step % HISTORY], rates_K, strict=True):
                place.fill_(rate)
            row_adamw(table, _held(table_RD, gradient._indices()[0]), gradient._values())
            if step % HISTORY == 0:
                catch_up_rows(table)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = dict(self.state)
        super().load_state_dict(state_dict)
        self._done.clear()
        for table_RD, group in self._tables():
            if table_RD not in self.state:
                continue
            state = self.state[table_RD] = _converted(self.state[table_RD], table_RD, group)
            for key, place in before.get(table_RD, {}).items():  # where a CUDA graph finds it
                state[key] = place.copy_(state[key])

    def _tables(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for table_RD in group["params"]:
                yield table_RD, group

    def _state(self, table_RD: Tensor, group: dict[str, Any]) -> TableState:
        state = self.state[table_RD]
        if not state:
            # Counts are of the table's dtype, as a state that is loaded is made that.
            table_RD, own_RD = table_RD.detach(), local_part(table_RD.detach())
            state |= {name: torch.zeros_like(table_RD) for name in ("exp_avg", "exp_avg_sq")}
            state |= {name: zero_per_row(table_RD) for name in ("last", "until")}
            state |= {"step": own_RD.new_zeros(()), "rates": _no_rates(own_RD, group)}
        names = "exp_avg", "exp_avg_sq", "last", "until", "step", "rates"
        own = (local_part(value) for value in (table_RD.detach(), *(state[name] for name in names)))
        return TableState(*own, betas=group["betas"], eps=group["eps"])


def _held(table_RD: Tensor, rows_M: Tensor) -> Tensor:
    """Rows by their numbers among those that this rank holds, all of which it does."""
    first = first_row(table_RD)
    return rows_M - first if first else rows_M


def _no_rates(own_RD: Tensor, group: dict[str, Any]) -> Tensor:
    """`rates_HK` of steps that change nothing."""
    rates_HK = own_RD.new_zeros(HISTORY, 3 if group["weight_decay"] else 2)
    rates_HK[:, 2:] = 1
    return rates_HK


def _converted(state: dict[str, Tensor], table_RD: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """A loaded state: of this class; or of another AdamW, which leaves nothing to make up for."""
    own_RD, rates_HK = local_part(table_RD.detach()), _no_rates(local_part(table_RD.detach()), group)
    if "last" in state:
        step, last_R, num = state["step"].to(own_RD), state["last"], min(rates_HK.shape[1], state["rates"].shape[1])
        if num < rates_HK.shape[1]:  # weights did not decay before: rows that have stopped did not miss that
            last_R = last_R.clone()
            local_part(last_R).masked_fill_(local_part(state["until"]) < step, float(step))
        rates_HK[:, :num] = state["rates"][:, :num]
        return {**state, "step": step, "last": last_R, "rates": rates_HK}
    step = full_tensor(state["seen"]).max() if "seen" in state else state["step"].to(own_RD)
    last_R, until_R = (zero_per_row(table_RD.detach()) for _ in range(2))
    local_part(last_R).fill_(step)
    local_part(until_R).fill_(step + lasting_steps(group["betas"], own_RD.dtype))
    return {
        "exp_avg": state["exp_avg"],
        "exp_avg_sq": state["exp_avg_sq"],
        "last": last_R,
        "until": until_R,
        "step": step,
        "rates": rates_HK,
    }
