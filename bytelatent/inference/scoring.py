"""Log-probabilities of texts after prompts, and a byte LM's entropies.

A prompt is read once. The texts that may follow it lie end to end in one stream and are read in one pass: each byte
attends to the prompt's KV cache and to its own text's earlier bytes, and so does each patch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
SHARED_IDS = 256  # ids of a prefix that is worth reading apart
SHARING = 1024  # prompts that are compared with the first of them
AT_ONCE = 8192  # ids of a document whose entropies are found in one pass
PIECE = 2048  # ids that a longer one is read by
SLICE = 16_384  # ids whose logits are held at once

Ids = tuple[int, ...]
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
    """log P(continuation | prompt) in nats of each pair; as `scored_pairs`, all at once."""
    scores = dict(scored_pairs(decoder, pairs))
    return [scores[number].log_probability for number in range(len(pairs))]


class Score(NamedTuple):
    """Of a continuation after its prompt.

    Attributes:
        log_probability: in nats; 0 of an empty one.
        is_greedy: whether each of its ids is the most likely one.
    """

    log_probability: float
    is_greedy: bool


def scored_pairs(decoder: Decoder, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
    """The number of each pair and its score, in the order in which they become known.

    Equal prompts are read once, and so is a long prefix that several prompts share, such as the examples before
    questions. Memory does not grow with the number of pairs; a continuation of more than PASS_IDS ids is read piece by
    piece.
    """
    followers: dict[Ids, list[int]] = {}
    for number, (prompt, _) in enumerate(pairs):
        followers.setdefault(tuple(prompt.tolist()), []).append(number)
    for state, logits, prompts in _read_prompts(decoder, list(followers)):
        items = [(slot, number) for slot, prompt in enumerate(prompts) for number in followers[prompt]]
        texts = {number: pairs[number][1].to(decoder.device) for _, number in items}
        first, likeliest = logits.double().log_softmax(-1), logits.argmax(-1)
        scores = {}
        for slot, number in items:
            ids = texts[number][:1]
            scores[number] = Score(float(first[slot, ids].sum()), bool((likeliest[slot] == ids).all()))
        longer = [(slot, number) for slot, number in items if len(texts[number]) > 1]
        yield from ((number, score) for number, score in scores.items() if len(texts[number]) <= 1)
        for group in _passes(longer, texts, state.open_count.tolist()):
            for (_, number), rest in zip(group, _after_first(decoder, state, group, texts), strict=True):
                begin = scores[number]
                both = begin.log_probability + rest.log_probability, begin.is_greedy and rest.is_greedy
                yield number, Score(*both)


def _read_prompts(decoder: Decoder, prompts: list[Ids]) -> Iterator[tuple[DecodeState, Tensor, list[Ids]]]:
    """Prompts in groups that are read together: their state, the logits [N, V] of what follows each, and themselves."""
    alone: list[Ids] = []
    for size, sharing in _by_prefix(sorted(prompts)):
        if not size:
            alone += sharing
            continue
        prefix, _ = decoder.prefill([torch.tensor(sharing[0][:size])], last_only=True)
        for group in _groups(sharing, size):
            state = decoder.empty(len(group))
            state.put(range(len(group)), prefix, [0] * len(group))
            rest = [torch.tensor(prompt[size:], device=decoder.device) for prompt in group]
            slots = torch.arange(len(group), device=decoder.device)
            slots = slots.repeat_interleave(torch.tensor([len(ids) for ids in rest], device=decoder.device))
            yield state, decoder.extend(state, slots, torch.cat(rest), last_only=True), group
    for group in _groups(sorted(alone, key=len)):
        state, logits = decoder.prefill([torch.tensor(prompt) for prompt in group], last_only=True)
        yield state, logits, group


def _by_prefix(prompts: list[Ids]) -> Iterator[tuple[int, list[Ids]]]:
    """Sorted prompts in groups that share a prefix, and its size; 0 for one whose prefix is not worth reading apart.

    Of the groups that begin with a prompt, the one that saves most ids.
    """
    begin = 0
    while begin < len(prompts):
        first, shared, best, count = prompts[begin], len(prompts[begin]) - 1, 0, 1
        sizes = []
        for other in prompts[begin + 1 : begin + SHARING]:
            shared = min(shared, len(other) - 1, _common(first, other, shared))
            if shared < SHARED_IDS:
                break
            sizes.append(shared)
            if shared * len(sizes) >= best:
                best, count = shared * len(sizes), len(sizes) + 1
        yield sizes[count - 2] if count > 1 else 0, prompts[begin : begin + count]
        begin += count


def _common(one: Ids, other: Ids, most: int) -> int:
    """The number of ids, up to `most`, that two prompts begin with alike."""
    if one[:most] == other[:most]:
        return min(most, len(other))
    return next(index for index, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)


def _groups(prompts: list[Ids], num_read: int = 0) -> Iterator[list[Ids]]:
    """Prompts in groups that are read together, of each of which `num_read` ids are read already."""
    group: list[Ids] = []
    for prompt in prompts:
        if group and (len(group) == PROMPTS or sum(map(len, group)) + len(prompt) - num_read > PROMPT_IDS):
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


def _after_first(decoder: Decoder, state: DecodeState, group: list[Item], texts: dict[int, Tensor]) -> list[Score]:
    """The score of all ids of each text but its first, which their prompt alone decides about."""
    read = [texts[number][:-1] for _, number in group]
    if len(read) == 1 and len(read[0]) > PASS_IDS:
        return [_of_long(decoder, state, group[0][0], texts[group[0][1]])]
    logits = decoder.branch(state, [slot for slot, _ in group], read)
    sizes = [len(ids) for ids in read]
    expected = [texts[number][1:] for _, number in group]
    return [_of(part, ids) for part, ids in zip(logits.split(sizes), expected, strict=True)]


def _of_long(decoder: Decoder, state: DecodeState, slot: int, text: Tensor) -> Score:
    """The score of one long text, read piece by piece in a slot of its own."""
    own = decoder.empty(1)
    own.put([0], state, [slot])
    parts = [
        _of(decoder.extend(own, torch.zeros_like(read), read), expected)
        for read, expected in zip(text[:-1].split(PASS_IDS), text[1:].split(PASS_IDS), strict=True)
    ]
    return Score(sum(part.log_probability for part in parts), all(part.is_greedy for part in parts))


def _of(logits_TV: Tensor, ids: Tensor) -> Score:
    """The score of ids [T]; probabilities in float64."""
    found = logits_TV.double().log_softmax(-1).gather(1, ids[:, None])
    return Score(float(found.sum()), bool((logits_TV.argmax(-1) == ids).all()))


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
        is_plain = not (settings.attention_bias or settings.qk_norm)
        return is_plain and can_attend(*heads) and can_gate(2 * settings.hidden_dim, settings.dim)

    @torch.no_grad()
    def __call__(self, stream: Stream) -> Tensor:
        """Uncertainty about the id that follows each id, in nats, float32 [T]."""
        settings = self.settings
        eps, dim = settings.norm_eps, settings.dim
        size = len(stream.ids)
        padding = torch.arange(-size % ROWS, device=stream.ids.device)  # kernels take blocks of ROWS rows
        ids, position = torch.cat([stream.ids, padding * 0]), torch.cat([stream.position, padding])
        low = first_seen(position, settings.window)
        cos, sin = cos_sin(position, settings.head_dim, settings.rope_theta, settings.rope_scaling)
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
