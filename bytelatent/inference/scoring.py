"""How likely texts are after a prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bytelatent.inference.decode import Decoder
from bytelatent.inference.state import SLACK, DecodeState

ROWS = 16  # continuations read at once


def log_probabilities(decoder: Decoder, prompt: Tensor, continuations: Sequence[Tensor]) -> list[float]:
    """log P(continuation | prompt) in nats; the prompt is read once.

    Args:
        prompt: [N] ids, BOS first.
        continuations: ids of each; an empty one has log-probability 0.
    """
    state, logits = decoder.prefill([prompt])
    scores = [0.0] * len(continuations)
    for begin in range(0, len(continuations), ROWS):
        group = continuations[begin : begin + ROWS]
        rows = decoder.empty(len(group))
        for row in range(len(group)):
            rows.put(row, state, 0)
        for row, score in enumerate(_of_group(decoder, rows, logits[-1], group)):
            scores[begin + row] = score
    return scores


def _of_group(decoder: Decoder, state: DecodeState, logits: Tensor, group: Sequence[Tensor]) -> list[float]:
    """A few ids of every row at a time, each predicted by the logits before it."""
    before = [logits for _ in group]
    scores = [0.0] * len(group)
    for at in range(0, max((len(ids) for ids in group), default=0), SLACK):
        parts = [ids[at : at + SLACK].to(decoder.device) for ids in group]
        sizes = [len(part) for part in parts]
        rows = torch.repeat_interleave(torch.arange(len(group)), torch.tensor(sizes)).to(decoder.device)
        found = decoder.extend(state, rows, torch.cat(parts)).split(sizes)
        for row, (part, after) in enumerate(zip(parts, found, strict=True)):
            if len(part):
                predicting = torch.cat([before[row][None], after[:-1]]).double().log_softmax(-1)
                scores[row] += float(predicting.gather(1, part[:, None]).sum())
                before[row] = after[-1]
    return scores
