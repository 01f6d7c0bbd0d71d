"""Models and streams small enough to check by hand."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bytelatent.model import (
    BLTModel,
    BLTSettings,
    ByteLM,
    ByteLMSettings,
    PatchedStream,
    Stream,
    add_patches,
    build_model,
)
from bytelatent.model.settings import CrossAttentionSettings, NgramHashSettings, RopeScaling, StackSettings
from bytelatent.vocab import NEWLINE, VOCAB_SIZE

# Shapes: T ids in the stream, P patches


def make(settings: ByteLMSettings | BLTSettings, seed: int = 0) -> Any:
    """A model with random weights, those of norms and biases too, which would otherwise be ones and zeros."""
    torch.manual_seed(seed)
    model = build_model(settings)
    for part in model.modules():
        if isinstance(part, nn.RMSNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return model.eval()


def tiny_byte_lm(seed: int = 0, **changes: Any) -> ByteLM:
    values: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_heads": 2, "multiple_of": 8} | changes
    return make(ByteLMSettings(**values), seed)


def tiny_blt_settings(window: int | None = None, stop_at_document: bool = True, **changes: Any) -> BLTSettings:
    local = StackSettings(dim=16, num_layers=2, num_heads=2, multiple_of=8, window=window)
    values: dict[str, Any] = {
        "encoder": local,
        "global_transformer": StackSettings(dim=24, num_layers=2, num_heads=3, multiple_of=8),
        "decoder": local,
        "cross_attention": CrossAttentionSettings(k=2, num_heads=4),
        "ngram_hash": NgramHashSettings(sizes=[3, 4], vocab_size=53, stop_at_document=stop_at_document),
    }
    return BLTSettings(**values | changes)


def tiny_blt(seed: int = 0, **changes: Any) -> BLTModel:
    return make(tiny_blt_settings(**changes), seed)


SCALING = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)


@st.composite
def block_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of blocks of Llama, Qwen2 and Qwen3; often none."""
    if draw(st.booleans()):
        return {}
    return {
        "head_size": draw(st.sampled_from([None, 4, 10])),
        "attention_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "rope_scaling": draw(st.sampled_from([None, SCALING])),
    }


@st.composite
def stacks(draw: st.DrawFn, dim: int | None = None, window: bool = True, options: bool = True) -> dict[str, Any]:
    """Settings of a stack, of width `dim` where it is given."""
    shapes = [(heads, size) for heads in (1, 2, 4) for size in (2, 4, 6, 8) if dim is None or heads * size == dim]
    heads, size = draw(st.sampled_from(shapes))
    return {
        "dim": heads * size,
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([None, *(n for n in (1, 2, 4) if heads % n == 0)])),
        "num_layers": draw(st.integers(1, 2)),
        "window": draw(st.none() | st.integers(1, 12)) if window else None,
        "ffn_dim_multiplier": draw(st.sampled_from([1.0, 1.3])),
        "multiple_of": draw(st.sampled_from([1, 8])),
        "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 500_000.0])),
        **(draw(block_options()) if options else {}),
    }


@st.composite
def byte_lm_settings(draw: st.DrawFn, options: bool = True) -> ByteLMSettings:
    return ByteLMSettings(**draw(stacks(options=options)))


@st.composite
def blt_settings(draw: st.DrawFn, crosses: bool | None = None, options: bool = True) -> BLTSettings:
    """`crosses`: with or without cross-attention; None: either. `options`: see `block_options`."""
    k, dim = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 16]))
    global_dim = draw(st.sampled_from([k * dim, 6, 24]))
    crosses = draw(st.sampled_from([True, True, True, False])) if crosses is None else crosses
    return BLTSettings(
        encoder=StackSettings(**draw(stacks(dim, options=options))),
        global_transformer=StackSettings(
            dim=global_dim,
            num_layers=2,
            num_heads=global_dim // 2,
            num_kv_heads=draw(st.sampled_from([None, 1])),
            multiple_of=4,
            **(draw(block_options()) if options else {}),
        ),
        decoder=StackSettings(**draw(stacks(dim, options=options))),
        cross_attention=CrossAttentionSettings(
            k=k,
            num_heads=(heads := draw(st.sampled_from([1, 2, 4]))),
            num_kv_heads=draw(st.sampled_from([None, 1, heads])),
            all_layers_encoder=draw(st.booleans()),
            all_layers_decoder=draw(st.booleans()),
        )
        if crosses
        else None,
        joined_bytes=1 if crosses else k,
        added_to="readers" if crosses else draw(st.sampled_from(["readers", "closing"])),
        ngram_hash=draw(
            st.none()
            | st.builds(
                NgramHashSettings,
                sizes=st.lists(st.integers(1, 8), min_size=1, max_size=2),
                num_functions=st.integers(1, 3),
                vocab_size=st.just(97),
                stop_at_document=st.booleans(),
            )
        ),
    )


def random_ids(generator: torch.Generator, size: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, [size], generator=generator)


def random_lines(generator: torch.Generator, size: int) -> Tensor:
    """The same with newlines, about one in seven."""
    ids = random_ids(generator, size)
    return torch.where(ids % 7 == 0, NEWLINE, ids)


def random_starts(generator: torch.Generator, size: int, share: float = 0.4) -> Tensor:
    return torch.rand(size, generator=generator) < share


def stream_of(documents: Sequence[Tensor], padding: int = 0) -> Stream:
    """Documents end to end, then padding."""
    ids, document, position = [], [], []
    for number, row in [*enumerate(documents), (-1, torch.zeros(padding, dtype=torch.long))]:
        for place, value in enumerate(row.tolist()):
            ids.append(value)
            document.append(number)
            position.append(place)
    return Stream(*(torch.tensor(values, dtype=torch.long) for values in (ids, document, position)))


def patched_stream_of(
    documents: Sequence[Tensor], starts: Sequence[Tensor], padding: int = 0, more_slots: int = 0
) -> PatchedStream:
    """The same, cut into patches, with `more_slots` unused patch slots, as one row of several documents."""
    next_starts = torch.cat([*starts, torch.zeros(padding, dtype=torch.bool)])
    stream = stream_of(documents, padding)
    slots = add_patches(stream, next_starts).num_patches + more_slots
    return add_patches(stream, next_starts, slots, history=torch.arange(len(next_starts)))
