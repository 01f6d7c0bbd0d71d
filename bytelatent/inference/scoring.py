"""Log-probabilities of texts after prompts, and a byte LM's entropies.

A prompt is read once. The texts that may follow it lie end to end in one stream and are read in one pass: each byte
attends to the prompt's KV cache and to its own text's earlier bytes, and so does each patch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import DecodeState
from bytelatent.kernels.gated_product import ROWS, can_gate, gated_product, interleaved, row_scale
from bytelatent.kernels.rotary import cos_sin
from bytelatent.kernels.window_attention import can_attend, first_seen, window_attention
from bytelatent.model import ByteLM, LanguageModelSettings, Stream, entropies

# Shapes: T ids, V vocabulary, D width

PASS_IDS = 1024  # ids of texts read at once, where each prompt counts as many as the one with most
PROMPTS = 16  # prompts in a KV cache at once
PROMPT_IDS = 16_384  # ids of prompts read at once, unless a single one is longer
AT_ONCE = 8192  # ids of a document whose entropies are found in one pass
PIECE = 2048  # ids that a longer one is read by
SLICE = 16_384  # ids whose logits are held at once

Pair = tuple[Tensor, Tensor]  # ids of a prompt and of what may follow it
Item = tuple[int, int]  # a slot of the state, and the number of the pair that continues it


def log_probabilities(decoder: Decoder, prompt: Tensor, continuations: Sequence[Tensor]) -> list[float]:
    """log P(continuation | prompt) in nats; the prompt is read once.

    Args:
        prompt: [N] ids, BOS first.
        continuations: ids of each; an empty one has log-probability 0.
    """
    return log_probabilities_of_pairs(decoder, [(prompt, ids) for ids in continuations])


def log_probabilities_of_pairs(decoder: Decoder, pairs: Sequence[Pair]) -> list[float]:
    """log P(continuation | prompt) in nats of each pair; equal prompts are read once.

    Memory does not grow with the number of pairs; a continuation of more than PASS_IDS ids is read piece by piece.
    """
    followers: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, _) in enumerate(pairs):
        followers.setdefault(tuple(prompt.tolist()), []).append(number)
    scores = [0.0] * len(pairs)
    for prompts in _prompts(sorted(followers, key=len)):
        state, logits = decoder.prefill([torch.tensor(prompt) for prompt in prompts], last_only=True)
        items = [(slot, number) for slot, prompt in enumerate(prompts) for number in followers[prompt]]
        texts = {number: pairs[number][1].to(decoder.device) for _, number in items}
        first = logits.double().log_softmax(-1)
        for slot, number in items:
            scores[number] = float(first[slot, texts[number][:1]].sum())  # of an empty text, 0
        longer = [(slot, number) for slot, number in items if len(texts[number]) > 1]
        for group in _passes(longer, texts, state.open_count.tolist()):
            for (_, number), score in zip(group, _after_first(decoder, state, group, texts), strict=True):
                scores[number] += score
    return scores


def _prompts(prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts in groups that are read together."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        if group and (len(group) == PROMPTS or sum(map(len, group)) + len(prompt) > PROMPT_IDS):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _passes(items: list[Item], texts: dict[int, Tensor], opened: list[int]) -> Iterator[list[Item]]:
    """Texts in groups that are read together; one that is too long for that is alone."""
    group: list[Item] = []
    of_slot: dict[int, int] = {}  # ids to read or to gather
    for slot, number in items:
        size = len(texts[number]) - 1 + opened[slot]
        with_others = of_slot.get(slot, 0) + size
        if group and max(with_others, *of_slot.values()) * len({*of_slot, slot}) > PASS_IDS:
            yield group
            group, of_slot, with_others = [], {}, size
        group.append((slot, number))
        of_slot[slot] = with_others
    if group:
        yield group


def _after_first(decoder: Decoder, state: DecodeState, group: list[Item], texts: dict[int, Tensor]) -> list[float]:
    """log P of all ids of each text but its first, which their prompt alone decides about."""
    read = [texts[number][:-1] for _, number in group]
    if len(read) == 1 and len(read[0]) > PASS_IDS:
        return [_of_long(decoder, state, group[0][0], texts[group[0][1]])]
    logits = decoder.branch(state, [slot for slot, _ in group], read)
    found = _of(logits, torch.cat([texts[number][1:] for _, number in group]))
    return [float(part.sum()) for part in found.split([len(ids) for ids in read])]


def _of_long(decoder: Decoder, state: DecodeState, slot: int, text: Tensor) -> float:
    """The log-probability of one long text, read piece by piece in a slot of its own."""
    own = decoder.empty(1)
    own.put(0, state, slot)
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


class FastEntropies:
    """Entropies of packed streams.

    Args:
        byte_lm: on the device that computes.
        dtype: of the weights and states; sums, norms and softmaxes are float32.
    """

    @torch.no_grad()
    def __init__(self, byte_lm: ByteLM, dtype: torch.dtype = torch.bfloat16):
        self.settings = byte_lm.settings
        self.embedding = byte_lm.embedding.weight.detach().to(dtype)
        self.norm = byte_lm.norm.weight.detach().to(dtype)
        self.output = byte_lm.output.weight.detach().to(dtype)
        blocks: Any = byte_lm.stack.blocks
        self.layers = [_packed(block, dtype) for block in blocks]

    @classmethod
    def where_possible(cls, byte_lm: ByteLM | None, device: torch.device, dtype: torch.dtype) -> "FastEntropies | None":
        """Create it for a byte LM; None if the kernels cannot compute it on this device or in this precision."""
        if byte_lm is None or device.type != "cuda" or dtype != torch.bfloat16:
            return None
        return cls(byte_lm) if cls.supports(byte_lm.settings) else None

    @staticmethod
    def supports(settings: LanguageModelSettings) -> bool:
        """Whether the kernels can do a byte LM of this shape."""
        heads = (settings.num_heads, settings.kv_heads, settings.head_dim)
        return can_attend(*heads) and can_gate(2 * settings.hidden_dim, settings.dim)

    @torch.no_grad()
    def __call__(self, stream: Stream) -> Tensor:
        """Uncertainty about the id that follows each id, in nats, float32 [T]."""
        settings = self.settings
        eps, dim = settings.norm_eps, settings.dim
        size = len(stream.ids)
        padding = torch.arange(-size % ROWS, device=stream.ids.device)  # kernels take blocks of ROWS rows
        ids, position = torch.cat([stream.ids, padding * 0]), torch.cat([stream.position, padding])
        low = first_seen(position, settings.window)
        cos, sin = cos_sin(position, settings.head_dim, settings.rope_theta)
        x_TD = F.embedding(ids, self.embedding)
        for layer in self.layers:
            qkv = F.linear(F.rms_norm(x_TD, (dim,), layer["attention_norm"], eps), layer["qkv"])
            q, k, v = qkv.unflatten(-1, (3, settings.num_heads, settings.head_dim)).unbind(1)
            x_TD.addmm_(window_attention(q, k, v, low, cos, sin).flatten(1), layer["output"].T)
            x_TD.addmm_(gated_product(x_TD, row_scale(x_TD, eps), layer["gate_up"]), layer["down"].T)
        parts = x_TD.split(SLICE)  # float32 logits of all ids at once would take more than the model
        found = [entropies(F.linear(F.rms_norm(x, (dim,), self.norm, eps), self.output)) for x in parts]
        return torch.cat(found)[:size]


def _packed(block: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """A block's matrices, joined."""
    attention, feed_forward, norm = block.attention, block.feed_forward, block.feed_forward_norm.weight
    matrices = {
        "attention_norm": block.attention_norm.weight,
        "qkv": torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]),
        "output": attention.output.weight,
        "gate_up": interleaved(feed_forward.gate.weight * norm, feed_forward.up.weight * norm),
        "down": feed_forward.down.weight,
    }
    return {name: matrix.detach().to(dtype) for name, matrix in matrices.items()}
