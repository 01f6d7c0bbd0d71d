"""Drafts by the byte LM: the same bytes where the likeliest is taken, the same distribution where it is not."""

from collections import Counter

import pytest
import torch

from bytelatent.errors import UserError
from bytelatent.inference import Decoder, Engine, Sampling, prompt_ids
from bytelatent.inference.engine import Continuation
from bytelatent.inference.sampling import SamplingRows
from bytelatent.inference.speculation import DRAFTS, SpeculativeRows, _drawn_from, _Row
from bytelatent.patching import PatchSettings
from tests.inference.test_engine import PROMPTS, decoders, generated, wide_blt


def speculative(decoder: Decoder, num_rows: int, longest: int, bound: float | None = None) -> Engine:
    return Engine(decoder, SpeculativeRows(decoder, num_rows, longest, bound), num_rows)


@pytest.mark.parametrize("name", ["entropy", "split"])
@pytest.mark.parametrize(("longest", "bound"), [(1, None), (4, None), (8, 10.0)])
def test_greedy_bytes_are_those_of_plain_decoding(name: str, longest: int, bound: float | None) -> None:
    decoder = decoders()[name]
    for expected, found in zip(
        generated(Engine.plain(decoder, 2), PROMPTS, 25),
        generated(speculative(decoder, 2, longest, bound), PROMPTS, 25),
        strict=True,
    ):
        assert found.ids == expected.ids
        assert found.ended == expected.ended
        torch.testing.assert_close(
            torch.tensor(found.log_probabilities), torch.tensor(expected.log_probabilities), atol=1e-4, rtol=0
        )


def test_a_byte_lm_that_expects_the_same_is_always_right() -> None:
    """Heads of zeros: every id is as likely, in the model and in its draft."""
    decoder = decoders(seed=3)["entropy"]
    assert decoder.byte_lm is not None
    with torch.no_grad():
        for head in (decoder.model.decoder.output, decoder.byte_lm.output):  # type: ignore[union-attr]
            head.weight.zero_()
    engine = speculative(decoder, 1, 6, bound=10.0)
    [found] = generated(engine, ["x"], 30, Sampling(temperature=1.0, seed=1))
    rows = engine.rows
    assert isinstance(rows, SpeculativeRows)
    assert len(found.ids) > 5
    assert rows.accepted == rows.drafted


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=5)])
def test_sampled_bytes_have_the_distribution_of_plain_decoding(sampling: Sampling) -> None:
    """Pairs of bytes after one prompt, of many seeds, with few bytes that are likely enough to count."""
    decoder = decoders(seed=5)["entropy"]
    assert decoder.byte_lm is not None
    with torch.no_grad():
        for head in (decoder.model.decoder.output, decoder.byte_lm.output):  # type: ignore[union-attr]
            head.weight.mul_(2.5)
    count = 800
    pairs = []
    for engine in (Engine.plain(decoder, 64), speculative(decoder, 64, 3, bound=10.0)):
        asked = engine.submit(prompt_ids("ab"), sampling, 2, samples=count)
        engine.run()
        pairs.append(Counter(tuple(one.ids) for one in asked))
    plain, drafted = pairs
    likely = [pair for pair, number in (plain + drafted).items() if number >= 16]
    assert len(likely) >= 3
    # Two samples of one distribution: each pair's counts differ by a few standard deviations at most.
    for pair in likely:
        a, b = plain[pair], drafted[pair]
        assert abs(a - b) < 5 * (a + b) ** 0.5, pair
    chi_square = sum((plain[p] - drafted[p]) ** 2 / (plain[p] + drafted[p]) for p in likely)
    assert chi_square < len(likely) + 5 * (2 * len(likely)) ** 0.5


def test_a_drafted_byte_has_the_models_distribution() -> None:
    """One draft, kept or drawn anew, of many seeds: p, whatever it was drafted from."""
    decoder = decoders()["entropy"]
    rows = SpeculativeRows(decoder, 1)
    p, q = torch.full((260,), -torch.inf), torch.full((260,), -torch.inf)
    ids, ours, theirs = [50, 60, 70, 80], [0.5, 0.3, 0.15, 0.05], [0.1, 0.3, 0.2, 0.4]
    p[ids], q[ids] = torch.tensor(ours).log(), torch.tensor(theirs).log()
    count = 2000
    seen: Counter[int] = Counter()
    for seed in range(count):
        sampling = SamplingRows.empty(1, "cpu")
        rule = Sampling(temperature=1.0, seed=seed)
        sampling.put(0, rule, torch.tensor([1]), 9)
        one = _Row(Continuation(torch.tensor([1]), rule, 9), sampling, p, q)
        one.before, one.weights = [sampling], [sampling.weights(q[None])[0]]
        one.draft = [_drawn_from(one.weights[0], rows._random(one, DRAFTS))]
        rows._verify(one, [p, p])
        [drawn] = rows.drawn()
        seen[drawn.id] += 1
    assert set(seen) == set(ids)
    for i, probability in zip(ids, ours, strict=True):
        spread = (count * probability * (1 - probability)) ** 0.5
        assert abs(seen[i] - count * probability) < 4 * spread, (i, seen)


def test_rules_without_a_byte_lm_have_nothing_to_draft_with() -> None:
    with pytest.raises(UserError, match="speculation: it drafts with the byte LM"):
        SpeculativeRows(Decoder(wide_blt(0), PatchSettings(mode="space"), None), 1)
