"""Sets of slots, patch starts, alternatives and stored states with every form of the decode step."""

import itertools
import random
from typing import Any

import pytest
import torch

from bytelatent.inference import Engine, Sampling
from bytelatent.inference.prefix_cache import PrefixCache
from bytelatent.inference.step import CapturedSlots, SizedSlots, sized_slots
from bytelatent.inference.step.step import BLTStep
from bytelatent.vocab import EOS
from tests.inference.test_engine import ASSUMING, FAST, KINDS, decoder_of, engine_of
from tests.inference.test_prompts import check_starts_and_alternatives, text_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["entropy", "split", "all layers"])
def test_starts_and_alternatives(name: str, kind: str) -> None:
    check_starts_and_alternatives(name, kind)


@pytest.mark.parametrize("kind", ["plain", "fast", "fast, seldom", "assuming"])
def test_prompts_go_on_from_what_was_generated(kind: str) -> None:
    """As a chat does: the prompt and the answer begin the next prompt."""
    decoder = decoder_of("entropy", seed=1)
    engine, alone = engine_of(decoder, kind, 2), Engine.plain(decoder, 1)
    cache = PrefixCache(10**9, shortest=8)
    queue = engine.serve(24, cache)
    for stop, seed in (([], 1), (["e", "a", "t"], 2)):
        prompt, hot = text_of(seed, 20), Sampling(temperature=1.0, seed=seed, stop=stop)
        for _ in range(3):
            [which] = engine.submit(prompt, hot, 40)
            engine.run()
            [expected] = alone.submit(prompt, hot, 40)
            alone.run()
            assert which.ids == expected.ids
            assert which.ended == expected.ended
            read = [id_ for id_ in which.ids if id_ != EOS]
            prompt = torch.cat([prompt, torch.tensor(read, dtype=torch.long), text_of(seed + 9, 15)[1:]])
    assert cache.hits == 4
    assert queue.num_read + cache.num_reused > queue.num_read > 0
    if kind != "fast, seldom":  # there a patch may wait at the end
        assert queue.num_read <= 2 * (20 + 2 * 16)


@pytest.mark.parametrize("kind", ["fast", "fast, seldom", "assuming, seldom", "beside, seldom"])
@pytest.mark.parametrize("name", ["entropy", "joined"])
def test_sets_of_slots(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that join and leave, so that others move between sets in the midst of their patches."""
    monkeypatch.setattr(sized_slots, "GROWTH", 2)
    monkeypatch.setattr(sized_slots, "PATIENCE", 3)
    decoder = decoder_of(name)

    def make(count: int, like: CapturedSlots | None) -> CapturedSlots:
        slots = CapturedSlots(decoder, count, like=like, **FAST[kind])
        if isinstance(slots.step, BLTStep):
            slots.step.assumes_open |= kind in ASSUMING
            assert like is None or slots.step.blt is like.step.blt  # pyright: ignore[reportAttributeAccessIssue]
        return slots

    slots = SizedSlots(make, 6)
    assert list(slots.sets) == [1, 2, 3, 6]
    engine, alone = Engine(decoder, slots, 6), Engine.plain(decoder, 1)
    asked, sizes, chance = [], [], random.Random(1)
    for number in range(90):
        if number % 40 < 6 and chance.random() < 0.9:
            sampling = Sampling(temperature=1.0, seed=number, valid_utf8=number % 2 == 0, repetition_penalty=1.1)
            size = chance.randint(4, 20)
            asked += engine.submit(text_of(number, chance.randint(1, 9)), sampling, size)
        engine.advance()
        sizes.append(slots.size)
    engine.run()
    assert {1, 2, 3} <= set(sizes)
    assert sum(before > after for before, after in itertools.pairwise(sizes)) >= 2
    for which in asked:
        [expected] = alone.submit(which.prompt, which.sampling, which.max_new_bytes)
        alone.run()
        assert which.ids == expected.ids
    assert not slots._index


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_admission_that_fails_harms_no_other(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among several at once, while others move between sets: before a slot was written, and after."""
    monkeypatch.setattr(sized_slots, "GROWTH", 2)
    decoder = decoder_of("entropy")
    slots = SizedSlots(lambda count, like: CapturedSlots(decoder, count, like=like), 6)
    engine, alone = Engine(decoder, slots, 6), Engine.plain(decoder, 1)
    engine.serve(1000)
    for each in slots.sets.values():

        def admit(state: Any, admitted: Any, there: Any = each, real: Any = each.admit) -> None:
            fails = any(one.which.sampling.seed in (3, 5) for one in admitted)
            if when == "before" and fails:
                raise torch.OutOfMemoryError("no memory")
            real(state, admitted)
            if fails:
                raise RuntimeError("in the midst")

        monkeypatch.setattr(each, "admit", admit)
    asked = engine.submit("two", Sampling(temperature=1.0, seed=20), 30, 2)
    engine.advance()
    for seed in range(8):
        asked += engine.submit(text_of(seed, 5 + seed), Sampling(temperature=1.0, seed=seed), 20)
    engine.run()
    for which in asked:
        if which.sampling.seed in (3, 5):
            assert (which.ended, which.ids) == ("failed", [])
            continue
        [expected] = alone.submit(which.prompt, which.sampling, which.max_new_bytes)
        alone.run()
        assert (which.ids, which.ended) == (expected.ids, expected.ended)
    assert not slots._index
