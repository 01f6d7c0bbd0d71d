"""Generation. Each new byte costs a full forward pass over what was read."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bytelatent.inference.sampling import Sampling, sample
from bytelatent.model import BLTModel, ByteLM, add_patches, pack_rows
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.vocab import EOS

# Shapes: B rows, V vocabulary


@torch.no_grad()
def generate_ids(
    model: BLTModel | ByteLM,
    patching: PatchSettings | None,
    byte_lm: ByteLM | None,
    prompts: Sequence[Tensor],
    max_new_bytes: int,
    sampling: Sampling,
) -> Iterator[list[int | None]]:
    """Continue every prompt, byte by byte.

    Args:
        model: a BLT, or the byte LM itself.
        patching, byte_lm: where a BLT's patches begin.
        prompts: ids of each row, BOS first; any lengths.
        max_new_bytes: a row ends after as many, or at EOS.

    Yields:
        The next id of each row, B of them; None for rows that have ended. EOS is given once.
    """
    device = next(model.parameters()).device
    rows = [prompt.to(device) for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in rows]
    running = list(range(len(rows)))
    for _ in range(max_new_bytes):
        if not running:
            return
        logits = _next_logits(model, patching, byte_lm, [rows[row] for row in running])
        drawn: list[int | None] = [None] * len(rows)
        for row, row_logits in zip(list(running), logits, strict=True):
            drawn[row] = chosen = sample(row_logits, sampling, generators[row])
            rows[row] = torch.cat([rows[row], torch.tensor([chosen], device=device)])
            if chosen == EOS:
                running.remove(row)
        yield drawn


def _next_logits(
    model: BLTModel | ByteLM, patching: PatchSettings | None, byte_lm: ByteLM | None, rows: Sequence[Tensor]
) -> Tensor:
    """[B, V] for the id after each row."""
    stream = pack_rows(list(rows))
    last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    if isinstance(model, ByteLM):
        return model(stream)[last]
    assert patching is not None
    entropies = byte_lm.entropies(stream) if byte_lm is not None and patching.needs_entropies else None
    starts = next_starts(stream.ids, entropies, stream.position, patching)
    return model(add_patches(stream, starts, history=stream.position))[last]
