"""How likely texts are after prompts, and how hard a text is to predict byte by byte.

A prompt is read once. The texts that may follow it lie end to end in one stream and are read in one pass: each byte
sees what is remembered of the prompt and its own text's earlier bytes, and so does each patch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bytelatent.inference.decoder import Decoder, State
from bytelatent.model import ByteLM, Stream, entropies

# Shapes: T ids, V vocabulary

PASS_IDS = 1024  # ids of texts read at once, where each prompt counts as many as the one with most
PROMPTS = 16  # prompts remembered at once
PROMPT_IDS = 16_384  # ids of prompts read at once, unless a single one is longer
AT_ONCE = 8192  # ids of a document whose entropies are found in one pass
PIECE = 2048  # ids that a longer one is read by

Pair = tuple[Tensor, Tensor]  # ids of a prompt and of what may follow it
Place = tuple[int, int]  # a row of the state, and the number of the pair that goes on from there


def log_probabilities(decoder: Decoder, prompt: Tensor, continuations: Sequence[Tensor]) -> list[float]:
    """log P(continuation | prompt) in nats; the prompt is read once.

    Args:
        prompt: [N] ids, BOS first.
        continuations: ids of each; an empty one has log-probability 0.
    """
    return log_probabilities_of_pairs(decoder, [(prompt, ids) for ids in continuations])


def log_probabilities_of_pairs(decoder: Decoder, pairs: Sequence[Pair]) -> list[float]:
    """The same of many prompts, each with a continuation of its own; equal prompts are read once, wherever they stand.

    Memory does not grow with the number of pairs; a continuation of more than PASS_IDS ids is read piece by piece.
    """
    followers: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, _) in enumerate(pairs):
        followers.setdefault(tuple(prompt.tolist()), []).append(number)
    scores = [0.0] * len(pairs)
    for prompts in _prompts(sorted(followers, key=len)):
        state, logits = decoder.prefill([torch.tensor(prompt) for prompt in prompts], last_only=True)
        places = [(row, number) for row, prompt in enumerate(prompts) for number in followers[prompt]]
        texts = {number: pairs[number][1].to(decoder.device) for _, number in places}
        first = logits.double().log_softmax(-1)
        for row, number in places:
            scores[number] = float(first[row, texts[number][:1]].sum())  # of an empty text, 0
        longer = [(row, number) for row, number in places if len(texts[number]) > 1]
        for group in _passes(longer, texts, state.open_count.tolist()):
            for (_, number), score in zip(group, _after_first(decoder, state, group, texts), strict=True):
                scores[number] += score
    return scores


def _prompts(prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts in groups that are read and remembered together."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        if group and (len(group) == PROMPTS or sum(map(len, group)) + len(prompt) > PROMPT_IDS):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _passes(places: list[Place], texts: dict[int, Tensor], opened: list[int]) -> Iterator[list[Place]]:
    """Texts in groups that are read together; one that is too long for that is alone."""
    group: list[Place] = []
    of_row: dict[int, int] = {}  # ids to read or to gather
    for row, number in places:
        size = len(texts[number]) - 1 + opened[row]
        with_others = of_row.get(row, 0) + size
        if group and max(with_others, *of_row.values()) * len({*of_row, row}) > PASS_IDS:
            yield group
            group, of_row, with_others = [], {}, size
        group.append((row, number))
        of_row[row] = with_others
    if group:
        yield group


def _after_first(decoder: Decoder, state: State, group: list[Place], texts: dict[int, Tensor]) -> list[float]:
    """log P of all ids of each text but its first, which their prompt alone decides about."""
    read = [texts[number][:-1] for _, number in group]
    if len(read) == 1 and len(read[0]) > PASS_IDS:
        return [_of_long(decoder, state, group[0][0], texts[group[0][1]])]
    logits = decoder.branch(state, [row for row, _ in group], read)
    found = _of(logits, torch.cat([texts[number][1:] for _, number in group]))
    return [float(part.sum()) for part in found.split([len(ids) for ids in read])]


def _of_long(decoder: Decoder, state: State, row: int, text: Tensor) -> float:
    """The same of one text, piece by piece, in a row of its own."""
    own = decoder.empty(1)
    own.put(0, state, row)
    score = 0.0
    for read, expected in zip(text[:-1].split(PASS_IDS), text[1:].split(PASS_IDS), strict=True):
        score += float(_of(decoder.extend(own, torch.zeros_like(read), read), expected).sum())
    return score


def _of(logits_TV: Tensor, ids: Tensor) -> Tensor:
    """The log-probability of each id, float64 [T]."""
    return logits_TV.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]


@torch.no_grad()
def entropies_of(byte_lm: ByteLM, stream: Stream) -> Tensor:
    """Uncertainty about the id that follows each id, in nats, float32 [T].

    A single long document is read piece by piece with a KV cache: the same entropies, without a mask of all pairs.
    """
    if len(stream.ids) <= AT_ONCE or stream.num_documents != 1:
        return byte_lm.entropies(stream)
    decoder = Decoder(byte_lm, None, None)
    first, *others = stream.ids.split(PIECE)
    state, logits = decoder.prefill([first])
    found = [entropies(logits)]
    for piece in others:
        found.append(entropies(decoder.extend(state, torch.zeros_like(piece), piece)))
    return torch.cat(found)
