"""Some bytes of every row while the global transformer runs for others. For many rows.

A step of many rows is a chain of small kernels, none of which keeps the device busy. The global transformer's matrices
are most of the weights, and no row but those whose patch has just closed needs them. So two chains run beside one
another: one comes on by some bytes of all rows that have logits, the other runs the global transformer for the rows
that were chosen as the step before ended. A row is, one after another:

    reading          it draws a byte and reads it; the decoder reads the byte as if the patch stayed open
    waiting          its patch has closed, up to the end of the step
    running          the global transformer runs for it, a whole step
    ready            the decoder reads its newest byte again, with the new patch; from the next byte on it is reading

Rows are what they are without the waiting.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bytelatent.inference.decode import Decoder
from bytelatent.inference.fast.graph import Side
from bytelatent.inference.fast.step import FastStep
from bytelatent.kernels.decode_step import Flags
from bytelatent.kernels.overlap import overlapped

# Shapes: B rows


class BesideStep(FastStep):
    """A step of `size` bytes; a BLT's.

    Args:
        places: rows for which a step runs the global transformer at most; all if left out.
    """

    def __init__(self, decoder: Decoder, num_rows: int, size: int, places: int | None = None):
        super().__init__(decoder, num_rows, places or num_rows)
        device = decoder.device
        self.beside = Side(device)
        others = [Flags.empty(num_rows, 1, device) for _ in range(size - 1)]
        shared = {"is_active": self.flags.is_active, "is_waiting": self.flags.is_waiting}
        self.bytes = [self.flags, *(replace(flags, **shared) for flags in others)]
        self.every = torch.arange(num_rows, device=device)
        self.is_running, self.is_ready, self.is_left = (torch.zeros_like(self.flags.is_active) for _ in "rrl")
        self.choice = replace(self.flags, wants=torch.zeros_like(self.is_left), is_waiting=self.is_left)
        self.flags.closing.fill_(-1)

    @torch.no_grad()
    def __call__(self) -> None:
        """One step."""
        with self.beside.beside():
            self._run_global(self.flags.run)
        for flags in self.bytes:
            self._next_byte(flags, flags is self.flags)
        self.beside.join()
        with overlapped(False):  # what comes first comes after two kernels
            self._choose()

    def _next_byte(self, flags: Flags, is_first: bool) -> None:
        """Draw and read a byte of each row that reads; the logits of these, and of those that are ready."""
        state, kernels = self.state, self.kernels
        assert state.encoded is not None
        kernels.draw(self.logits_BV, self.sampling, state.position, flags)
        kernels.append(state, flags)
        with self.side.beside():
            lm_logits = self._read_byte_lm(flags.ids, flags.at, flags.row)
        torch.where(flags.reads[:, None], self._encode(state, flags), state.encoded, out=state.encoded)
        row = torch.where(self.is_ready, self.every, flags.row) if is_first else flags.row
        self._decode_newest(state.encoded, flags, row)
        self.side.join()
        with overlapped(False):
            kernels.decide(lm_logits, self.decoder.patching, state, flags)
        flags.is_waiting.copy_(flags.wants & ~self.is_ready if is_first else flags.wants)

    def _choose(self) -> None:
        """Those for which the global transformer ran are ready; those whose patch has closed since come next."""
        self.is_ready.copy_(self.is_running)
        torch.logical_and(self.flags.is_waiting, ~self.is_running, out=self.choice.wants)
        self.kernels.choose(self.state, self.choice, 0.0, True)
        torch.ge(self.flags.goes_on, 0, out=self.is_running)

    def rest(self, row: int) -> None:
        super().rest(row)
        self.is_running[row] = self.is_ready[row] = self.is_left[row] = False
        self.flags.closing.masked_fill_(self.flags.closing == row, -1)

    def _at_work(self) -> list[Tensor]:
        flags = self.flags
        chosen = [flags.closing, flags.number, flags.closing_count, flags.run]
        return [*super()._at_work(), *chosen, self.is_running, self.is_ready, self.is_left]

    def outcome(self) -> tuple[Tensor, Tensor]:
        return (
            torch.stack([flags.drawn for flags in self.bytes]),
            torch.stack([flags.log_probability for flags in self.bytes]),
        )
