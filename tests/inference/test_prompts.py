"""Prompts that are read in chunks and go on from stored states, against the full forward pass."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.inference import Continuation, Decoder, Engine, Sampling
from bytelatent.inference.continuation import Continuation as Sequence
from bytelatent.inference.engine import OutOfRoom
from bytelatent.inference.prefix_cache import PrefixCache
from bytelatent.inference.prompts import PromptQueue
from bytelatent.patching import PatchSettings, next_starts
from tests.inference.test_decoder import PATCHINGS, assert_close, full_logits
from tests.inference.test_engine import GREEDY, decoder_of, engine_of, shared_decoder
from tests.model.tiny import blt_settings, byte_lm_settings, make, random_lines

BOS = torch.tensor([1])


def text_of(seed: int, size: int) -> Tensor:
    return torch.cat([BOS, random_lines(torch.Generator().manual_seed(seed), size)])[:size]


@settings(max_examples=6, deadline=None)
@given(shape=blt_settings(), byte_lm=byte_lm_settings(), patching=PATCHINGS, seed=st.integers(0, 1000))
def test_what_is_read_equals_the_full_forward(shape: Any, byte_lm: Any, patching: PatchSettings, seed: int) -> None:
    """Prompts of a few beginnings, in chunks of any size, with room for some states; each is then read on."""
    chance = random.Random(seed)
    decoder = Decoder(make(shape, seed).double(), patching, make(byte_lm, seed).double())
    cache = PrefixCache(chance.choice([10**9, 10**9, 60_000]), shortest=chance.randint(1, 9))
    queue = PromptQueue(decoder, chance.randint(1, 40), cache)
    begin = [text_of(seed + number, chance.randint(5, 60)) for number in range(2)]
    prompts = []
    for number in range(9):
        start = chance.choice(begin)[: chance.randint(1, 60)]
        prompts.append(torch.cat([start, text_of(number, chance.randint(1, 30))[1:]]))
    prompts.append(prompts[0])
    read = 0
    for prompt in prompts:
        queue.add([Sequence(prompt, GREEDY, 1)])
        queue.read(3)
        for found, [which] in queue.take(3):
            check_read(decoder, found.state, found.source, found.logits, which.prompt)
            read += 1
    for _ in range(400):
        queue.read(3)
        for found, [which] in queue.take(3):
            check_read(decoder, found.state, found.source, found.logits, which.prompt)
            read += 1
    assert read == len(prompts)
    assert not queue.groups
    assert cache.num_bytes <= cache.max_bytes
    assert cache.num_bytes == sum(prefix.num_bytes for prefix in cache._prefixes.values())
    assert queue.num_read + cache.num_reused == sum(map(len, prompts))


def test_chunks_of_one_id() -> None:
    """Half a chunk is none: a prompt that waits begins once nothing is read on."""
    decoder = shared_decoder("entropy")
    queue = PromptQueue(decoder, 1)
    for size in (20, 5):
        queue.add([Sequence(text_of(size, size), GREEDY, 1)])
    for _ in range(25):
        queue.read(3)
    for found, [which] in queue.take(3):
        check_read(decoder, found.state, found.source, found.logits, which.prompt)
    assert (queue.num_read, queue.groups) == (25, [])


def check_read(decoder: Decoder, state: Any, source: int, logits: Tensor, prompt: Tensor) -> None:
    more = text_of(len(prompt), 9)[1:]
    expected = full_logits(decoder, [torch.cat([prompt, more])])[0][len(prompt) - 1 :]
    assert_close(logits, expected[0])
    mine = decoder.empty(2)
    mine.put([1], state, [source])
    assert_close(decoder.extend(mine, torch.ones(len(more), dtype=torch.long), more), expected[1:])


def test_what_is_stored() -> None:
    """The ends of prompts, and where two of them part; the oldest makes room."""
    queue = PromptQueue(shared_decoder("entropy"), 16, PrefixCache(10**9, shortest=10))
    assert queue.cache is not None
    shared, parts = text_of(1, 50), [text_of(2, 30)[1:], text_of(3, 30)[1:], text_of(4, 30)[1:]]

    def num_read_for(*pieces: Tensor) -> int:
        before = queue.num_read
        queue.add([Sequence(torch.cat(pieces), GREEDY, 1)])
        while queue.groups:
            queue.read(1)
            queue.take(1)
        return queue.num_read - before

    assert num_read_for(shared, parts[0]) == 79
    assert num_read_for(shared, parts[0]) == 0
    assert num_read_for(shared, parts[0], parts[1]) == 29
    assert num_read_for(shared, parts[1]) == 79  # nobody knew that others begin like this
    assert num_read_for(shared, parts[2]) == 29
    assert num_read_for(text_of(1, 9)) == 9  # too short to be worth it
    one = next(iter(queue.cache._prefixes.values())).num_bytes
    queue.cache.max_bytes = int(1.5 * one)
    assert num_read_for(text_of(5, 79)) == 79
    assert len(queue.cache._prefixes) == 1
    assert queue.cache.num_bytes <= queue.cache.max_bytes


def test_long_prompts_do_not_keep_short_ones_waiting() -> None:
    queue = PromptQueue(shared_decoder("entropy"), 32)
    queue.add([Sequence(text_of(0, 1000), GREEDY, 1)])
    for number in range(12):
        queue.add([Sequence(text_of(number, 10), GREEDY, 1)])
    steps, ready = 0, 0
    while ready < 12:
        before = queue.num_read
        queue.read(20 - ready)
        assert queue.num_read - before <= 32
        ready += len(queue.take(20))
        steps += 1
        assert steps <= 14
    assert queue.reading[0].position >= 16 * (steps - 1)  # it was read on meanwhile
    queue.waiting.clear()
    queue.reading[0].members[0].ended = "cancelled"
    queue.drop_ended()
    assert not queue.groups
    assert queue._state is None


@pytest.mark.parametrize(("name", "kind"), [("entropy", "plain"), ("split", "fast, seldom")])
def test_starts_and_alternatives(name: str, kind: str) -> None:
    check_starts_and_alternatives(name, kind)


def check_starts_and_alternatives(name: str, kind: str) -> None:
    decoder = decoder_of(name)
    engine = engine_of(decoder, kind, 3)
    hot = Sampling(temperature=1.0, seed=3)
    prompts = [text_of(number, 5 + 7 * number) for number in range(4)]
    asked = [
        engine.submit(prompt, hot, 25, num_alternatives=3 * (number % 2))[0] for number, prompt in enumerate(prompts)
    ]
    engine.run()
    for number, which in enumerate(asked):
        ids = torch.cat([which.prompt, torch.tensor(which.ids)])
        assert decoder.patching is not None
        found = None if decoder.byte_lm is None else decoder.byte_lm.entropies(one_document(ids))
        starts = next_starts(ids, found, torch.arange(len(ids)), decoder.patching)
        assert which.starts == starts[len(which.prompt) - 1 : -1].tolist()
        likely = full_logits(decoder, [ids])[0][len(which.prompt) - 1 : -1].log_softmax(-1)
        assert len(which.alternatives) == (len(which.ids) if number % 2 else 0)
        for row, alternatives in zip(likely, which.alternatives, strict=False):
            assert [id_ for id_, _ in alternatives] == row.argsort(descending=True)[:3].tolist()
            assert_close(torch.tensor([value for _, value in alternatives]), row.sort(descending=True).values[:3])


def one_document(ids: Tensor) -> Any:
    from bytelatent.model import pack_rows

    return pack_rows([ids])


class Faulty(Decoder):
    """A decoder that cannot read the id 200, and none of its states when told so."""

    def prefill(self, prompts: Any, last_only: bool = False) -> Any:
        self.check(torch.cat(list(prompts)))
        return super().prefill(prompts, last_only)

    def extend(self, state: Any, slots: Tensor, ids: Tensor, last_only: bool = False) -> Tensor:
        self.check(ids)
        return super().extend(state, slots, ids, last_only)

    def check(self, ids: Tensor) -> None:
        if bool((ids == 200).any()):
            raise torch.OutOfMemoryError("no memory")


def test_an_error_ends_the_sequences_it_concerns() -> None:
    fine = decoder_of("entropy")
    decoder = Faulty(fine.model, fine.patching, fine.byte_lm)
    engine = engine_of(decoder, "fast", 4)
    engine.serve(16)
    good = [text_of(number, 12 + 9 * number) for number in range(4)]
    bad = [good[0].clone(), good[3].clone()]
    bad[0][3] = bad[1][25] = 200
    asked = [engine.submit(prompt, GREEDY, 8)[0] for prompt in [bad[0], *good[:2], bad[1], *good[2:]]]
    engine.run()
    alone = Engine.plain(fine, 1)
    for which in asked:
        if 200 in which.prompt.tolist():
            assert which.ended == "failed"
            assert isinstance(which.failure, torch.OutOfMemoryError)
            continue
        [expected] = alone.submit(which.prompt, GREEDY, 8)
        alone.run()
        assert which.ids == expected.ids
    engine = engine_of(decoder, "fast", 4)  # where nobody asks for that, errors are raised
    engine.submit(bad[0], GREEDY, 8)
    with pytest.raises(torch.OutOfMemoryError):
        engine.run()


def test_the_longest_sequence_ends_where_no_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(decoder_of("static"), "fast", 3)
    engine.serve(16)
    slots: Any = engine.slots
    asked: list[Continuation] = [
        engine.submit(text_of(number, size), GREEDY, 20)[0] for number, size in enumerate((9, 90, 30))
    ]
    while engine.waiting:
        engine.advance()
    room, calls = slots._make_room, []

    def full() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        room()

    monkeypatch.setattr(slots, "_make_room", full)
    engine.run()
    assert [which.ended for which in asked] == ["length", "failed", "length"]
    assert isinstance(asked[1].failure, OutOfRoom)
    assert not engine.is_broken


def test_an_error_in_a_step_ends_all_sequences_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(decoder_of("static"), "fast", 2)
    engine.serve(16)
    asked = [engine.submit(text_of(number, 9), GREEDY, 20)[0] for number in range(3)]
    while len(engine.waiting) > 1:
        engine.advance()
    slots: Any = engine.slots

    def broken(alternatives: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(slots, "_read_back", broken)
    assert {which.ended for which in engine.advance()} == {"failed"}
    assert engine.is_broken
    assert engine.waiting == [[asked[2]]]
