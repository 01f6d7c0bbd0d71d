"""Drafts: the same bytes where the likeliest is taken, the same distribution where it is not."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference import Continuation, Decoder, Engine, Sampling, prompt_ids
from bytelatent.inference.drafters import ByteLMDrafter, Drafter, LocalDrafter
from bytelatent.inference.engine import Drawn
from bytelatent.inference.sampling import SamplingRows, random_numbers
from bytelatent.inference.speculation import DRAFTS, LONGEST, Drafted, SpeculativeRows, drawn_from, verified
from bytelatent.inference.state import DecodeState
from bytelatent.model import pack_rows
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.vocab import EOS, VOCAB_SIZE
from tests.inference.test_decoder import RULES, assert_close, full_logits
from tests.inference.test_engine import PROMPTS, decoders, generated, wide_blt
from tests.model.tiny import blt_settings, byte_lm_settings, make, random_ids

ALL = 100.0  # nats: sure of everything, so that drafts are as long as they may be
# Greedy bytes may repeat for ever, and then entropies rise by nothing, or by what rounding makes of it.
NO_TIES = RULES.filter(lambda rule: rule.threshold_add is None)
DRAFTERS: dict[str, Callable[[Decoder], Drafter]] = {
    "byte LM": ByteLMDrafter,
    "byte LM, sure": lambda decoder: ByteLMDrafter(decoder, bound=ALL),
    "local": LocalDrafter,
}


def drafted_by(name: str, decoder: Decoder, num_rows: int, longest: int) -> Engine:
    return Engine(decoder, SpeculativeRows(decoder, num_rows, DRAFTERS[name](decoder), longest), num_rows)


def assert_same(found: Continuation, expected: Continuation) -> None:
    assert (found.ids, found.ended) == (expected.ids, expected.ended)
    assert_close(torch.tensor(found.log_probabilities), torch.tensor(expected.log_probabilities))


@pytest.mark.parametrize("name", list(DRAFTERS))
@pytest.mark.parametrize("kind", ["entropy", "split"])
@pytest.mark.parametrize("longest", [1, 5])
def test_greedy_bytes_are_those_of_plain_decoding(name: str, kind: str, longest: int) -> None:
    decoder = decoders()[kind]
    plain = generated(Engine.plain(decoder, 2), PROMPTS[:3], 20)
    for found, expected in zip(generated(drafted_by(name, decoder, 2, longest), PROMPTS[:3], 20), plain, strict=True):
        assert_same(found, expected)


@settings(max_examples=8)
@given(shapes=blt_settings(), byte_lm=byte_lm_settings(), rule=NO_TIES, seed=st.integers(0, 1000), data=st.data())
def test_greedy_bytes_of_any_model(
    shapes: Any, byte_lm: Any, rule: PatchSettings, seed: int, data: st.DataObject
) -> None:
    decoder = Decoder(make(shapes, seed), rule, make(byte_lm, seed))
    names = list(DRAFTERS) if rule.threshold is not None else ["local"]
    engine = drafted_by(data.draw(st.sampled_from(names)), decoder, 2, data.draw(st.integers(1, LONGEST)))
    for found in generated(engine, ["ab", "", "ab c"], 20):
        # Each was the likeliest, or as likely but for rounding, by the full forward pass.
        ids = torch.cat([found.prompt, torch.tensor(found.ids)])
        logits = full_logits(decoder, [ids])[0][len(found.prompt) - 1 : -1]
        logits[:, [0, 1, 3]] = -torch.inf
        ours = logits.gather(1, torch.tensor(found.ids)[:, None])[:, 0]
        assert (logits.amax(1) - ours).max() < 1e-4
        assert len(found.ids) == 20 or found.ids[-1] == EOS


class Wrong:
    """Drafts bytes that are hardly ever right, and reads them as the local models do."""

    def __init__(self, decoder: Decoder):
        self.local, self.generator = LocalDrafter(decoder), torch.Generator().manual_seed(0)

    def read(self, state: DecodeState, rows: Tensor, ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        logits, goes_on = self.local.read(state, rows, ids, position)
        return torch.randn(logits.shape, generator=self.generator) * 9, goes_on


@pytest.mark.parametrize("mode", ["byte", "space", "static", "entropy"])
def test_rejections_take_patches_back(mode: str) -> None:
    """Drafts close patches that never were: with `byte` one for each byte of a draft as long as any."""
    rule: dict[str, Any] = {"static": {"patch_size": 3}, "entropy": {"threshold": 5.12}}.get(mode, {})
    decoder = Decoder(wide_blt(0), PatchSettings.parse({"mode": mode} | rule), decoders()["entropy"].byte_lm)
    rows = SpeculativeRows(decoder, 2, Wrong(decoder), 99)
    plain = generated(Engine.plain(decoder, 2), PROMPTS[:3], 12)
    for found, expected in zip(generated(Engine(decoder, rows, 2), PROMPTS[:3], 12), plain, strict=True):
        assert_same(found, expected)
    assert rows.accepted < rows.drafted / 10


def test_local_drafts_read_the_newest_closed_patch() -> None:
    """What they expect is what the whole model would if no patch had closed since: by one that closes none."""
    decoder, generator = decoders()["split"], torch.Generator().manual_seed(3)
    assert decoder.byte_lm is not None
    prompt, after = prompt_ids("a prompt"), random_ids(generator, 9)
    state, _ = decoder.prefill([prompt])
    drafter, at = LocalDrafter(decoder), len(prompt)
    found = [
        drafter.read(state, torch.tensor([0]), after[number][None], torch.tensor([at + number]))[0]
        for number in range(len(after))
    ]
    closes_none = Decoder(decoder.model, PatchSettings(threshold=ALL), decoder.byte_lm)
    assert_close(torch.cat(found), closes_none.extend(state, torch.zeros(9, dtype=torch.long), after))
    # And reading ahead has changed nothing.
    [expected] = full_logits(decoder, [torch.cat([prompt, after])])
    fresh, _ = decoder.prefill([prompt])
    drafter.read(fresh, torch.tensor([0]), torch.tensor([99]), torch.tensor([at]))
    assert_close(decoder.extend(fresh, torch.zeros(9, dtype=torch.long), after), expected[at:])


def test_drafts_of_the_byte_lm_end_where_a_patch_begins() -> None:
    decoder, ids = decoders()["entropy"], prompt_ids("some text to be read")
    assert decoder.byte_lm is not None
    assert decoder.patching is not None
    stream = pack_rows([ids])
    starts = next_starts(ids, decoder.byte_lm.entropies(stream), stream.position, decoder.patching)
    state, _ = decoder.prefill([ids[:2]])
    drafter, row = ByteLMDrafter(decoder), torch.tensor([0])
    goes_on = [drafter.read(state, row, ids[at][None], torch.tensor([at]))[1] for at in range(2, len(ids))]
    assert torch.equal(torch.cat(goes_on), ~starts[2:])
    assert 0 < starts[2:].sum() < len(ids) - 2


@pytest.mark.parametrize("name", ["byte LM, sure", "local"])
def test_a_drafter_that_expects_the_same_is_always_right(name: str) -> None:
    """Heads of zeros: every id is as likely, in the model and in its draft."""
    decoder = decoders(seed=3)["entropy"]
    scale_heads(decoder, 0)
    engine = drafted_by(name, decoder, 1, 6)
    [found] = generated(engine, ["x"], 31, Sampling(temperature=1.0, seed=2))
    rows = engine.rows
    assert isinstance(rows, SpeculativeRows)
    assert len(found.ids) == 31
    assert rows.accepted == rows.drafted == 25  # the prompt gives one id, four steps 6 + 1 each, the last one 1 + 1
    assert rows.steps == 5


def scale_heads(decoder: Decoder, by: float) -> None:
    """Make the model and the byte LM surer of what follows, or with 0 let all ids be as likely."""
    model: Any = decoder.model
    assert decoder.byte_lm is not None
    with torch.no_grad():
        for head in (model.decoder.output, decoder.byte_lm.output):
            head.weight.mul_(by)


@pytest.mark.parametrize("name", ["byte LM, sure", "local"])
def test_where_rows_end(name: str) -> None:
    """After as many bytes as were asked for; at the end of a text; at a stop text, wherever in a draft it ends."""
    decoder = decoders()["entropy"]
    for count in range(1, 8):
        [found] = generated(drafted_by(name, decoder, 1, 4), ["The"], count)
        [expected] = generated(Engine.plain(decoder, 1), ["The"], count)
        assert_same(found, expected)
    [whole] = generated(Engine.plain(decoder, 1), ["The"], 15)
    for at in range(3, 9):
        sampling = Sampling(temperature=0, stop=[whole.data[at : at + 3], b"\x00never"])
        [found] = generated(drafted_by(name, decoder, 1, 6), ["The"], 15, sampling)
        [expected] = generated(Engine.plain(decoder, 1), ["The"], 15, sampling)
        assert_same(found, expected)
        assert found.ended == "stop"
    scale_heads(decoder, 0)  # of equals the end of the text is the lowest
    [found] = generated(drafted_by(name, decoder, 1, 4), ["abc"], 50)
    assert (found.ended, found.ids) == ("end of text", [EOS])


@pytest.mark.parametrize("name", ["byte LM, sure", "local"])
def test_the_end_of_a_text_within_a_draft(name: str) -> None:
    """It is drafted, kept, and followed by nothing: neither drafts nor bytes that the engine would have to ignore."""
    decoder = decoders(seed=3)["entropy"]
    scale_heads(decoder, 0)
    rows = SpeculativeRows(decoder, 12, DRAFTERS[name](decoder), 8)
    engine, known = Engine(decoder, rows, 12), rows.drawn
    told: Counter[int] = Counter()

    def counted() -> list[Drawn]:
        new = known()
        told.update(id(drawn.which) for drawn in new)
        return new

    rows.drawn = counted  # type: ignore[method-assign]
    asked = engine.submit(prompt_ids("x"), Sampling(temperature=1.0), 300, samples=12)
    engine.run()
    ended = [one for one in asked if one.ended == "end of text"]
    assert len(ended) > 4  # one in 257 ids
    assert all(one.ids[-1] == EOS and EOS not in one.ids[:-1] for one in ended)
    assert all(len(one.ids) == 300 for one in asked if one not in ended)
    assert all(told[id(one)] == len(one.ids) for one in asked)
    assert rows.accepted == rows.drafted


@pytest.mark.parametrize("name", list(DRAFTERS))
@pytest.mark.parametrize("change", [{"repetition_penalty": 1.5}, {"valid_utf8": True, "top_k": 9}])
def test_every_rule_of_sampling_is_the_models(name: str, change: dict[str, Any]) -> None:
    """Penalties and UTF-8 depend on what was drafted before; greedy bytes show that they are told of it."""
    decoder = decoders()["entropy"]
    greedy = Sampling(temperature=0, **change)
    plain = generated(Engine.plain(decoder, 3), [*PROMPTS, "\u4f60"], 25, greedy)
    for found, expected in zip(
        generated(drafted_by(name, decoder, 3, 5), [*PROMPTS, "\u4f60"], 25, greedy), plain, strict=True
    ):
        assert_same(found, expected)
    hot = Sampling(temperature=5.0, **change)
    for found in generated(drafted_by(name, decoder, 3, 5), ["\u4f60", "abc"], 40, hot):
        assert len(found.ids) == 40 or found.ended == "end of text"
        if hot.valid_utf8:
            assert found.data.decode()


@pytest.mark.parametrize("name", ["byte LM, sure", "local"])
def test_a_row_is_what_it_is_alone(name: str) -> None:
    decoder = decoders(seed=1)["entropy"]
    sampling = Sampling(temperature=1.0, seed=4)
    for found in generated(drafted_by(name, decoder, 3, 4), [*PROMPTS, "The"], 15, sampling):
        engine = drafted_by(name, decoder, 1, 4)
        [alone] = engine.submit(found.prompt, sampling, 15)
        engine.run()
        assert_same(found, alone)


@pytest.mark.parametrize("name", ["byte LM, sure", "local"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=5)])
def test_sampled_bytes_have_the_distribution_of_plain_decoding(name: str, sampling: Sampling) -> None:
    """Three bytes after one prompt, of many seeds, with few bytes that are likely enough to count."""
    decoder = decoders(seed=5)["entropy"]
    scale_heads(decoder, 2.5)
    texts = []
    for engine in (Engine.plain(decoder, 200), drafted_by(name, decoder, 200, 3)):
        asked = engine.submit(prompt_ids("ab"), sampling, 3, samples=1000)
        engine.run()
        texts.append([tuple(one.ids) for one in asked])
    for part in (slice(0, 2), slice(1, 3)):  # what the first id and a draft decide; what two drafts do
        plain, drafted = (Counter(ids[part] for ids in found) for found in texts)
        likely = [pair for pair, number in (plain + drafted).items() if number >= 16]
        assert len(likely) >= 3
        # Two samples of one distribution: each pair's counts differ by a few standard deviations at most.
        for pair in likely:
            a, b = plain[pair], drafted[pair]
            assert abs(a - b) < 5 * (a + b) ** 0.5, pair
        chi_square = sum((plain[p] - drafted[p]) ** 2 / (plain[p] + drafted[p]) for p in likely)
        assert chi_square < len(likely) + 5 * (2 * len(likely)) ** 0.5


class Same:
    """Expects the same after every id."""

    def __init__(self, logits_V: Tensor):
        self.logits_V = logits_V

    def read(self, state: DecodeState, rows: Tensor, ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits_V.expand(len(rows), -1), torch.ones_like(rows, dtype=torch.bool)


def test_drawing_and_verifying_are_unrelated() -> None:
    """The model finds four ids as likely; a drafter that does not changes nothing about any of three places."""
    decoder = decoders()["static"]
    model: Any = decoder.model
    with torch.no_grad():
        model.decoder.output.weight.zero_()
    four = [EOS, 4, 5, 6]  # of equals the lowest are kept
    logits = torch.full((VOCAB_SIZE,), -torch.inf)
    logits[four] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    engine = Engine(decoder, SpeculativeRows(decoder, 500, Same(logits), 3), 500)
    asked = engine.submit(prompt_ids("x"), Sampling(temperature=1.0, top_k=4), 4, samples=1500)
    engine.run()
    for place in range(1, 4):
        seen = Counter(one.ids[place] for one in asked if len(one.ids) > place)
        count = sum(seen.values())
        assert set(seen) == set(four)
        assert all(abs(number - count / 4) < 4 * (count * 3 / 16) ** 0.5 for number in seen.values()), seen


@pytest.mark.parametrize("exists", [True, False])
def test_a_verified_byte_has_the_models_distribution(exists: bool) -> None:
    """Kept or drawn anew, of many seeds: p, whatever it was drafted from; and p where nothing was drafted."""
    p, q = torch.full((VOCAB_SIZE,), -torch.inf), torch.full((VOCAB_SIZE,), -torch.inf)
    ids, ours, theirs = [50, 60, 70, 80], [0.5, 0.3, 0.15, 0.05], [0.1, 0.3, 0.2, 0.4]
    p[ids], q[ids] = torch.tensor(ours).log(), torch.tensor(theirs).log()
    count = 4000
    rows = SamplingRows.empty(count, "cpu")
    rows.temperature.fill_(1.0)
    rows.top_k.fill_(VOCAB_SIZE)
    rows.seed.copy_(torch.arange(count))
    rows.remaining.fill_(9)
    weights = rows.weights(q.expand(count, -1))
    drafts = drawn_from(weights, random_numbers(rows.seed ^ DRAFTS, rows.drawn))
    drafted = Drafted(drafts, weights, torch.full((count,), exists))
    found, kept = verified(rows, p.expand(count, -1), drafted)
    seen = Counter(found.tolist())
    assert set(seen) == set(ids)
    for i, probability in zip(ids, ours, strict=True):
        spread = (count * probability * (1 - probability)) ** 0.5
        assert abs(seen[i] - count * probability) < 4 * spread, (i, seen)
    assert torch.equal(found[kept], drafts[kept])
    expected = sum(map(min, ours, theirs)) if exists else 0.0  # the chance that a draft is kept
    assert abs(int(kept.sum()) / count - expected) < 0.05


def test_models_without_the_part_that_drafts() -> None:
    with pytest.raises(UserError, match="speculation: it drafts with the byte LM"):
        ByteLMDrafter(Decoder(wide_blt(0), PatchSettings(mode="space"), None))
    with pytest.raises(UserError, match="speculation: it drafts with a BLT's encoder and decoder"):
        LocalDrafter(decoders()["byte LM"])
