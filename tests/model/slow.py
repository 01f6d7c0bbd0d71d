"""The forward passes in float64 with plain loops, from the published facts alone; nothing of the package is used.

Names of weights are those of the models' state dicts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PRIMES = [1000000007, 5915587277, 1500450271]


class Weights:
    """A state dict in float64; `weights / "encoder"` is what stands below that name."""

    def __init__(self, values: dict[str, Any], prefix: str = ""):
        self.values, self.prefix = values, prefix

    def __truediv__(self, name: object) -> "Weights":
        return Weights(self.values, f"{self.prefix}{name}.")

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}.weight" in self.values

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[f"{self.prefix}{name}.weight"].double().numpy()

    def bias(self, name: str) -> np.ndarray:
        return self.values[f"{self.prefix}{name}.bias"].double().numpy()


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + eps) * weight


def softmax(scores: Sequence[float]) -> np.ndarray:
    powers = np.exp(np.array(scores) - max(scores))
    return powers / powers.sum()


def rotated(head: np.ndarray, position: int, theta: float, scaling: Any) -> np.ndarray:
    """Pairs (2i, 2i+1) turned by position * theta^(-2i/size); slow pairs turn more slowly where there is scaling."""
    out = head.copy()
    for first in range(0, len(head), 2):
        phase = position * theta ** (-first / len(head))
        if scaling is not None:
            length = 2 * np.pi * theta ** (first / len(head))  # positions until the pair is back
            longest, shortest = (
                scaling.original_context / scaling.low_freq_factor, scaling.original_context / scaling.high_freq_factor
            )  # fmt: skip
            if length > longest:
                phase /= scaling.factor
            elif length >= shortest:
                smooth = scaling.original_context / length - scaling.low_freq_factor
                smooth /= scaling.high_freq_factor - scaling.low_freq_factor
                phase = (1 - smooth) * phase / scaling.factor + smooth * phase
        turned = complex(head[first], head[first + 1]) * complex(np.cos(phase), np.sin(phase))
        out[first], out[first + 1] = turned.real, turned.imag
    return out


def attention(
    queries: Sequence[np.ndarray],
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    seen: Callable[[int], Sequence[int]],
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
) -> list[np.ndarray]:
    """Softmax attention, one query and one head at a time; zero for a query that sees nothing."""
    outputs = []
    for at, query in enumerate(queries):
        heads = [np.zeros(head_dim)] * num_heads
        for head in range(num_heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            shared_head = head * num_kv_heads // num_heads
            shared = slice(shared_head * head_dim, (shared_head + 1) * head_dim)
            if seen(at):
                weights = softmax([query[own] @ keys[i][shared] / np.sqrt(head_dim) for i in seen(at)])
                heads[head] = sum((w * values[i][shared] for w, i in zip(weights, seen(at), strict=True)), heads[head])
        outputs.append(np.concatenate(heads))
    return outputs


def block(x: list[np.ndarray], weights: Weights, settings: Any) -> list[np.ndarray]:
    """One pre-norm block over one document."""
    size, eps = settings.head_size or settings.dim // settings.num_heads, settings.norm_eps
    kv_heads = settings.num_kv_heads or settings.num_heads
    normed = [norm(row, weights["attention_norm"], eps) for row in x]
    layer = weights / "attention"

    def product(name: str, row: np.ndarray) -> np.ndarray:
        return layer[name] @ row + (layer.bias(name) if settings.attention_bias else 0)

    def turned(name: str) -> list[np.ndarray]:
        rows = []
        for at, row in enumerate(normed):
            heads = list(product(name, row).reshape(-1, size))
            if settings.qk_norm:
                heads = [norm(head, layer[f"{name}_norm"], eps) for head in heads]
            heads = [rotated(head, at, settings.rope_theta, settings.rope_scaling) for head in heads]
            rows.append(np.concatenate(heads))
        return rows

    def seen(at: int) -> range:
        return range(0 if settings.window is None else max(0, at - settings.window + 1), at + 1)

    values = [product("value", row) for row in normed]
    found = attention(turned("query"), turned("key"), values, seen, settings.num_heads, size, kv_heads)
    x = [row + layer["output"] @ out for row, out in zip(x, found, strict=True)]
    out = []
    for row in x:
        inner = norm(row, weights["feed_forward_norm"], eps)
        gate = weights["feed_forward.gate"] @ inner
        out.append(
            row + weights["feed_forward.down"] @ (gate / (1 + np.exp(-gate)) * (weights["feed_forward.up"] @ inner))
        )
    return out


def cross_attention(
    x: list[np.ndarray],
    cached: list[np.ndarray],
    seen: Callable[[int], Sequence[int]],
    weights: Weights,
    settings: Any,
    eps: float,
) -> list[np.ndarray]:
    """`x` attends to `cached`. The layer adds its input, and its caller adds it again."""
    queries = [weights["query"] @ norm(row, weights["query_norm"], eps) for row in x]
    normed = [norm(row, weights["key_value_norm"], eps) for row in cached]
    keys, values = [weights["key"] @ row for row in normed], [weights["value"] @ row for row in normed]
    num_heads, num_kv_heads = settings.num_heads, settings.num_kv_heads or settings.num_heads
    found = attention(queries, keys, values, seen, num_heads, len(x[0]) // num_heads, num_kv_heads)
    return [row + (row + weights["output"] @ out) for row, out in zip(x, found, strict=True)]


def ngram_hash(ids: Sequence[int], at: int, size: int, function: int, vocab: int) -> int:
    """The facts' sentence in Python's own integers."""
    grams = [ids[i] if i >= 0 else 0 for i in range(at - size + 1, at + 1)]
    total = sum(x * PRIMES[function] ** j for j, x in enumerate(grams)) % 2**64
    return (total - 2**64 if total >= 2**63 else total) % vocab


def byte_lm(settings: Any, state: dict[str, Any], ids: Sequence[int]) -> np.ndarray:
    """Logits [N, V] of one document."""
    weights = Weights(state)
    x = [weights["embedding"][i] for i in ids]
    for layer in range(settings.num_layers):
        x = block(x, weights / "stack.blocks" / layer, settings)
    return np.stack([weights["output"] @ norm(row, weights["norm"], settings.norm_eps) for row in x])


def blt(
    settings: Any, state: dict[str, Any], ids: Sequence[int], next_starts: Sequence[bool], before: Sequence[int] = ()
) -> np.ndarray:
    """Logits [N, V] of one document.

    Args:
        next_starts: for each id, whether the one after it starts a patch.
        before: ids that the n-grams reach before the document.
    """
    weights, cross = Weights(state), settings.cross_attention
    encoder, decoder = settings.encoder, settings.decoder
    is_start = [True, *next_starts]
    patch = [sum(is_start[: i + 1]) - 1 for i in range(len(ids) + 1)]  # of each id and of the one to come
    num_patches = patch[len(ids) - 1] + 1
    bytes_of = [[i for i in range(len(ids)) if patch[i] == p] for p in range(num_patches)]

    text, h = [*before, *ids], []
    for at, i in enumerate(ids):
        row, table = (weights / "encoder")["embedding"][i], 0
        if settings.ngram_hash is not None:
            tables = (weights / "encoder.ngram_hash")["tables"]
            for function in range(settings.ngram_hash.num_functions):
                for size in settings.ngram_hash.sizes:
                    vocab = settings.ngram_hash.vocab_size
                    row = row + tables[table * vocab + ngram_hash(text, len(before) + at, size, function, vocab)]
                    table += 1
        h.append(row)

    queries: list[np.ndarray] = []  # K in a row for each patch
    for layer in range(encoder.num_layers):
        h = block(h, weights / "encoder.stack.blocks" / layer, encoder)
        last = layer == encoder.num_layers - 1
        if cross is None or not (cross.all_layers_encoder or last):
            continue
        if not queries:
            for members in bytes_of:
                pooled = np.max([h[i] for i in members], axis=0)
                queries.extend(((weights / "encoder")["pooled_to_queries"] @ pooled).reshape(cross.k, -1))
        place = layer if cross.all_layers_encoder else 0
        queries = cross_attention(
            queries, h, lambda q: bytes_of[q // cross.k], weights / "encoder.cross_attention" / place,
            cross, encoder.norm_eps,
        )  # fmt: skip

    if cross is None:
        none = [np.zeros(encoder.dim)] * settings.joined_bytes
        patches = [np.concatenate([*none, *(h[i] for i in members)][-settings.joined_bytes :]) for members in bytes_of]
    else:
        patches = [np.concatenate(queries[p * cross.k : (p + 1) * cross.k]) for p in range(num_patches)]
    if "global_transformer.projection" in weights:
        patches = [(weights / "global_transformer")["projection"] @ row for row in patches]
    for layer in range(settings.global_transformer.num_layers):
        patches = block(patches, weights / "global_transformer.stack.blocks" / layer, settings.global_transformer)

    out = weights / "decoder"
    keys: list[np.ndarray] = []
    if cross is not None:
        keys = [key for row in patches for key in (out["patch_to_keys"] @ row).reshape(cross.k, -1)]
    for i in range(len(ids)) if cross is None else ():
        newest, closes = patch[i + 1] - 1, patch[i + 1] > patch[i]
        if closes or (newest >= 0 and settings.added_to == "readers"):
            h[i] = h[i] + out["patch_to_bytes"] @ norm(patches[newest], out["patch_norm"], decoder.norm_eps)

    def read(i: int) -> list[int]:
        newest = patch[i + 1] - 1
        return [] if newest < 0 else [newest * cross.k + j for j in range(cross.k)]

    for layer in range(decoder.num_layers):
        if cross is not None and (cross.all_layers_decoder or layer == 0):
            h = cross_attention(h, keys, read, weights / "decoder.cross_attention" / layer, cross, decoder.norm_eps)
        h = block(h, weights / "decoder.stack.blocks" / layer, decoder)
    return np.stack([out["output"] @ norm(row, out["norm"], decoder.norm_eps) for row in h])
