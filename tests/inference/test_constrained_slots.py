"""Sequences with constraints in slots, beside others: they draw from what is allowed, and nobody waits for them."""

import itertools
import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference import Continuation, Engine, Sampling
from bytelatent.inference import constraint as module
from bytelatent.inference.step import CapturedSlots
from bytelatent.vocab import EOS, OFFSET, Vocabulary
from tests.inference.test_constraint import after, allowed, constraint
from tests.inference.test_engine import engine_of, shared_decoder

HOT = Sampling(temperature=1.0)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GIVEN = [{"schema": PERSON}, {"regex": "(?:ab|[ç-ü])+"}, None, {"grammar": 'start: "(" start ")" | "é" start?'}]


def asked_of(engine: Engine, count: int, most: int = 40, **changes: Any) -> list[Continuation]:
    """Every fourth one is free."""
    sampling = [Sampling(**({"temperature": 1.0, "seed": number} | changes)) for number in range(count)]
    return [
        engine.submit("Say é", sampling[number], most - number % 3, constraint=about and constraint(**about))[0]
        for number, about in zip(range(count), itertools.cycle(GIVEN))
    ]


def outcome(one: Continuation) -> tuple[Any, ...]:
    return one.ids, one.ended, one.data


@cache
def plainly(number: int, most: int) -> tuple[Any, ...]:
    """What `asked_of` asks for, alone in a plain slot."""
    engine = Engine.plain(shared_decoder("entropy", seed=1), 1)
    *others, one = asked_of(engine, number + 1, most)
    for other in others:
        engine.cancel(other)
    engine.run()
    return outcome(one), one.log_probabilities


@pytest.mark.parametrize("kind", ["fast, seldom", "assuming, seldom"])
def test_slots_draw_what_is_allowed(kind: str) -> None:
    """With and without constraints side by side; each as plain slots draw it, alone."""
    decoder = shared_decoder("entropy", seed=1)
    engine = engine_of(decoder, kind, 3)
    asked = asked_of(engine, 6, 30)
    engine.run()
    for number, (one, about) in enumerate(zip(asked, itertools.cycle(GIVEN))):
        expected, log_probabilities = plainly(number, 30)
        assert outcome(one) == expected
        torch.testing.assert_close(
            torch.tensor(one.log_probabilities), torch.tensor(log_probabilities), atol=1e-4, rtol=0
        )
        if about is not None:
            assert one.ended == "length" or EOS in allowed(after(constraint(**about), one.data))
    assert {one.ended for one in asked} == {"length", "end of text"}
    assert all(json.loads(one.data)["age"] <= 150 for one in asked[::4] if one.ended == "end of text")


def test_log_probabilities_are_the_models_own() -> None:
    """Of all bytes, not of the allowed ones; and what is drawn is the likeliest of these."""
    decoder = shared_decoder("entropy", seed=1)
    engine = Engine.plain(decoder, 1)
    [one] = engine.submit("x", Sampling(temperature=0), 30, constraint=constraint(regex="[a-f]{10}"))
    logits = [decoder.prefill([one.prompt], last_only=True)[1][0]]
    while one.ended is None:
        engine.advance()
        logits.append(engine.slots.logits_BV[0].clone())  # pyright: ignore[reportAttributeAccessIssue]
    assert one.ids[-1] == EOS
    assert len(one.data) == 10
    for row, id_, log_probability in zip(logits[:-1], one.ids, one.log_probabilities, strict=True):
        assert row.log_softmax(-1)[id_].item() == pytest.approx(log_probability, abs=1e-5)
        letters = row[ord("a") + OFFSET : ord("g") + OFFSET]
        assert id_ in (EOS, ord("a") + OFFSET + int(letters.argmax()))


class Late:
    """What a card does: what a step drew is there once the host waits for it."""

    @staticmethod
    def query() -> bool:
        return False

    @staticmethod
    def synchronize() -> None:
        pass


class LateSlots(CapturedSlots):
    def _read_back(self, alternatives: tuple[Tensor, ...]) -> None:
        super()._read_back(alternatives)
        self.in_flight.append(replace(self.in_flight.pop(), event=Late()))


@pytest.mark.parametrize("quorum", [0.0, 0.6])
def test_steps_run_before_the_host_has_read_what_they_drew(quorum: float) -> None:
    """The bytes are the same: a slot that draws nothing in a step keeps its logits."""
    decoder = shared_decoder("entropy", seed=1)
    slots = LateSlots(decoder, 3, quorum=quorum)
    engine = Engine(decoder, slots, 3)
    asked = asked_of(engine, 6, 30)
    engine.run()
    assert [outcome(one) for one in asked] == [plainly(number, 30)[0] for number in range(6)]


def test_others_do_not_wait() -> None:
    """For a slot with a constraint, which takes part in every second step."""
    decoder = shared_decoder("entropy", seed=1)
    slots = LateSlots(decoder, 2)
    engine = Engine(decoder, slots, 2)
    [free] = engine.submit("x", Sampling(temperature=0), 99)
    [bound] = engine.submit("x", HOT, 30, constraint=constraint(regex="[a-z]{99}"))
    while bound.ended is None:
        engine.advance()
    assert 59 <= slots.num_steps <= 61
    assert len(free.ids) >= slots.num_steps - 1, "it took part in every step"
    engine.cancel(free)
    began = slots.num_steps
    [bound] = engine.submit("x", HOT, 30, constraint=constraint(regex="[a-z]{99}"))
    while bound.ended is None:
        engine.advance()
    assert slots.num_steps - began == 30, "alone it takes part in every one"


@pytest.mark.parametrize(
    "change", [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.2, "repetition_penalty": 1.7}, {"min_p": 0.3}]
)
def test_every_setting_applies_to_what_is_allowed(change: dict[str, Any]) -> None:
    decoder = shared_decoder("entropy", seed=1)
    plain, fast = Engine.plain(decoder, 2), engine_of(decoder, "fast", 2)
    found = [asked_of(engine, 4, 15, valid_utf8=True, **change) for engine in (plain, fast)]
    plain.run()
    fast.run()
    for one, other in zip(*found, strict=True):
        assert outcome(one) == outcome(other)
        one.data.decode()  # raises where it is no UTF-8, as a character that is cut at the limit


def test_ends() -> None:
    engine = Engine.plain(shared_decoder("entropy", seed=1), 4)
    three, more = constraint(regex="abc"), constraint(regex="abc+")
    [whole] = engine.submit("x", HOT, 9, constraint=three)
    [no_room_for_eos] = engine.submit("x", HOT, 3, constraint=three)
    [might_be_longer] = engine.submit("x", HOT, 3, constraint=more)
    [cut] = engine.submit("x", HOT, 2, constraint=three)
    [stopped] = engine.submit("x", Sampling(stop="bc"), 9, constraint=three)
    engine.run()
    assert [one.ended for one in (whole, no_room_for_eos, might_be_longer, cut, stopped)] == [
        *("end of text", "end of text", "length", "length", "stop")
    ]
    assert (whole.ids[-1], no_room_for_eos.ids[-1], stopped.data) == (EOS, ord("c") + OFFSET, b"a")


def test_what_cannot_be_followed_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a grammar whose dead end is far from its begin."""
    monkeypatch.setattr(module, "WALKS", 0)
    engine = Engine.plain(shared_decoder("entropy", seed=1), 2)
    [dead] = engine.submit("x", HOT, 9, constraint=constraint(grammar='start: "ab" /[^\\s\\S]/ | "ab" /[^\\s\\S]/ "c"'))
    [other] = engine.submit("x", HOT, 9, constraint=constraint(regex="ab"))
    engine.run()
    assert (dead.ended, str(dead.failure), dead.data) == ("failed", "grammar: no text meets it", b"ab")
    assert (other.ended, other.failure) == ("end of text", None)


def test_a_token_lm_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = Vocabulary()
    monkeypatch.setattr(vocabulary, "is_tokens", True)
    engine = Engine(shared_decoder("byte LM"), engine_of(shared_decoder("byte LM"), "plain", 1).slots, 1, vocabulary)
    with pytest.raises(UserError, match="regex: a token LM draws tokens, and only bytes are constrained; leave it out"):
        engine.submit("x", HOT, 9, constraint=constraint(regex="a"))
