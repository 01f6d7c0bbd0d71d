"""KV caches in 8 bits: every way to read a text attends to the same rounded keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.inference import Decoder, Engine, Sampling, prompt_ids
from bytelatent.inference.prefix_cache import PrefixCache
from bytelatent.inference.step import CapturedSlots, PrefillDecoder, SizedSlots, engine_for, sized_slots
from bytelatent.model.block import Attention
from bytelatent.model.settings import CrossAttentionSettings, StackSettings
from bytelatent.patching import PatchSettings
from tests.inference import test_decoder
from tests.inference.test_decoder import PATCHINGS, check
from tests.inference.test_engine import FAST, PROMPTS, decoder_of, engine_of
from tests.kernels.test_quantized_heads import by_hand
from tests.model.tiny import blt_settings, byte_lm_settings, make, tiny_blt, tiny_byte_lm

HOT = Sampling(temperature=1.0, seed=3)


@contextmanager
def attention_in_8_bits() -> Iterator[None]:
    """The models' own forward pass with keys and values rounded by a slow, obvious form."""
    before = Attention.forward

    def forward(self: Any, x_TD: Tensor, rotary_TE2: Tensor, mask: Any) -> Tensor:
        q_THE, k_TJE = self.queries_keys(x_TD, rotary_TE2)
        v_TJE = self.value(x_TD).unflatten(-1, (-1, q_THE.shape[-1]))
        k_TJE, v_TJE = (torch.stack([by_hand(one) for one in x]).to(x.dtype) for x in (k_TJE, v_TJE))
        return self.output(mask.attend(q_THE, k_TJE, v_TJE).flatten(-2))

    Attention.forward = forward
    try:
        yield
    finally:
        Attention.forward = before


def logits_in_8_bits(decoder: Decoder, rows: list[Tensor]) -> list[Tensor]:
    with attention_in_8_bits():
        return FULL_LOGITS(decoder, rows)


FULL_LOGITS = test_decoder.full_logits


@settings(max_examples=6, deadline=None)
@given(shape=blt_settings(), byte_lm=byte_lm_settings(), patching=PATCHINGS, seed=st.integers(0, 1000), data=st.data())
def test_logits_are_those_of_keys_and_values_in_8_bits(
    shape: Any, byte_lm: Any, patching: PatchSettings, seed: int, data: st.DataObject
) -> None:
    """Of prompts and then of a few ids at once, at every position."""
    decoder = Decoder(make(shape, seed).double(), patching, make(byte_lm, seed).double(), "int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_decoder, "full_logits", logits_in_8_bits)
        check(decoder, [25, 3], seed, data)


def test_the_way_a_gpu_reads_prompts() -> None:
    shape = StackSettings(dim=32, num_layers=2, num_heads=2, multiple_of=8, window=7)
    every = CrossAttentionSettings(k=2, num_heads=2, all_layers_encoder=True)
    middle = shape.model_copy(update={"window": None})
    model = tiny_blt(3, encoder=shape, decoder=shape, global_transformer=middle, cross_attention=every)
    parts = model, PatchSettings(threshold=5.12), tiny_byte_lm(3, dim=32, window=6)
    prompts = [prompt_ids("a prompt " * 9), prompt_ids("x")]
    (state, found), (other, expected) = (kind(*parts, "int8").prefill(prompts) for kind in (PrefillDecoder, Decoder))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for mine, theirs in zip(state._by_slot(), other._by_slot(), strict=True):
        assert mine.dtype == theirs.dtype
        is_whole = mine.dtype in (torch.int8, torch.uint8)
        torch.testing.assert_close(mine.float(), theirs.float(), atol=1.0 if is_whole else 1e-4, rtol=0)


def in_8_bits(name: str) -> Decoder:
    full = decoder_of(name)
    return Decoder(full.model, full.patching, full.byte_lm, "int8")


@pytest.mark.parametrize(
    ("name", "kind"), [("byte LM", "fast"), ("entropy", "fast, seldom"), ("lines", "assuming"), ("joined", "fast")]
)
def test_slots_are_plain_slots(name: str, kind: str) -> None:
    """And each sequence is what it is alone."""
    decoder = in_8_bits(name)
    asked = []
    for engine in (Engine.plain(decoder, 1), engine_of(decoder, kind, 3)):
        asked.append([engine.submit(prompt, HOT, 20)[0] for prompt in PROMPTS[:4]])
        engine.run()
    for one, other in zip(*asked, strict=True):
        assert (one.ids, one.ended) == (other.ids, other.ended)


def test_chunks_prefixes_and_sets_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's engine: sequences move between sets; prompts are read in chunks, or go on from stored ones."""
    monkeypatch.setattr(sized_slots, "GROWTH", 2)
    monkeypatch.setattr(sized_slots, "PATIENCE", 3)
    decoder = in_8_bits("entropy")
    slots = SizedSlots(lambda count, like: CapturedSlots(decoder, count, like=like, **FAST["fast"]), 4)
    engine, alone = Engine(decoder, slots, 4), Engine.plain(decoder, 1)
    cache = PrefixCache(10**9, shortest=8)
    engine.serve(16, cache)
    prompts = ["The same beginning, " * 3 + end for end in ("one", "two", "three", "four", "five")]
    asked, sizes = [], set()
    for number, prompt in enumerate(prompts):
        asked += engine.submit(prompt, Sampling(temperature=1.0, seed=number), 30)
        for _ in range(9):
            engine.advance()
            sizes.add(slots.size)
    engine.run()
    assert cache.hits > 0
    assert len(sizes) > 1
    for one in asked:
        [expected] = alone.submit(one.prompt, one.sampling, 30)
        alone.run()
        assert one.ids == expected.ids


def test_memory_and_settings() -> None:
    decoder = in_8_bits("entropy")
    sizes = [one.byte_lm.tables for one in (decoder_of("entropy").empty(2), decoder.empty(2)) if one.byte_lm]
    full, small = (sum(table.numel() * table.element_size() for table in tables) for tables in sizes)
    assert small / full == (16 + 1) / (16 * 4)  # heads of 16, and their scales
    model = BLT(decoder.model, BLT.from_pretrained("tiny", device="cpu").config, decoder.byte_lm)  # type: ignore[arg-type]
    assert model.kv_cache == "full"
    with pytest.raises(UserError, match=r"^kv_cache: 'int4' is not one of full, int8$"):
        model.kv_cache = "int4"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"^kv_cache: 8 is not one of full, int8$"):
        BLT.from_pretrained("absent", kv_cache=8)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^kv_cache: None is not"):
        engine_for(decoder.model, decoder.patching, decoder.byte_lm, 1, kv_cache=None)  # type: ignore[arg-type]


def test_a_model_generates_with_it() -> None:
    model, small = BLT.from_pretrained("tiny", device="cpu"), BLT.from_pretrained("tiny", device="cpu", kv_cache="int8")
    texts = [one.generate("The history of", max_new_bytes=20, temperature=0.0) for one in (model, small)]
    small.kv_cache = "full"
    assert small.generate("The history of", max_new_bytes=20, temperature=0.0) == texts[0]
    ids = prompt_ids("a text")[None]
    small.kv_cache = "int8"
    assert small.generate("The history of", max_new_bytes=20, temperature=0.0) == texts[1]
    assert torch.equal(small.logits(ids), model.logits(ids))
    log_probabilities = [
        one.generate("The", max_new_bytes=10, temperature=0.0, return_log_probabilities=True).log_probabilities
        for one in (model, small)
    ]
    assert not torch.equal(*log_probabilities)
