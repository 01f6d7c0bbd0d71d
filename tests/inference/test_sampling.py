"""From logits to ids, against plain Python that does one row at a time."""

import inspect
import math
import re
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference import sampling as module
from bytelatent.inference.sampling import SamplingSlots, random_numbers
from bytelatent.inference.settings import MAX_NEW_BYTES, Sampling
from bytelatent.inference.step import sampling as device_sampling
from bytelatent.inference.utf8 import NEEDED, TRANSITIONS, state_after
from bytelatent.vocab import BOE, BOS, BPE_DELIMITER, EOS, OFFSET, VOCAB_SIZE, decode, encode, to_bytes

SPECIAL = [BOE, BOS, BPE_DELIMITER]
INF = math.inf
HERE = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
MANY = settings(max_examples=200)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 1e-3, 0.5, 1, 2]),
    "top_k": st.sampled_from([None, 1, 2, 5, 300]),
    "top_p": st.sampled_from([None, 1e-6, 0.3, 0.6, 0.95, 1]),
    "min_p": st.sampled_from([None, 0, 0.11, 0.6, 1]),
    "repetition_penalty": st.sampled_from([1, 0.7, 1.5]),
    "seed": st.integers(-(1 << 63), (1 << 64) - 1),
    "valid_utf8": st.booleans(),
}
SAMPLINGS = st.builds(Sampling, **VALUES)
PROMPTS = st.one_of(
    st.binary(max_size=5),
    st.text(max_size=3).map(str.encode),
    st.sampled_from([6, 7]).map(lambda n: "🙂🙂".encode()[:n]),
)


@st.composite
def some_logits(draw: st.DrawFn) -> Tensor:
    """Of one row [V]; few values, so that many are equal, and many infinite."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    values = torch.tensor([-INF, -INF, -3, -0.5, 0, 0.25, 1, 2.5])[torch.randint(8, (VOCAB_SIZE,), generator=random)]
    few = torch.full([VOCAB_SIZE], -INF)
    few[torch.randint(VOCAB_SIZE, (4,), generator=random)] = torch.randn(4, generator=random)
    return draw(st.sampled_from([values, few, torch.randn(VOCAB_SIZE, generator=random) * 4]))


def one_row(sampling: Sampling, prompt: bytes = b"", max_new_bytes: int = 100) -> SamplingSlots:
    rows = SamplingSlots.empty(1, "cpu")
    rows.put(0, sampling, torch.from_numpy(encode(prompt, eos=False)), max_new_bytes)
    return rows


def draws(logits: Tensor, sampling: Sampling, count: int) -> list[int]:
    """The ids that a row draws one after another from the same logits."""
    rows = SamplingSlots(
        **{
            name: part.expand(count, *part.shape[1:])
            for name, part in vars(one_row(sampling)).items()
            if len(part) == 1
        },
        **{name: part for name, part in vars(one_row(sampling)).items() if len(part) > 1},
    )
    rows.drawn = torch.arange(count)
    return rows.draw(logits.expand(count, -1))[0].tolist()


def few_likely(*probabilities: float) -> Tensor:
    """Logits of ids 100, 101, ... with these probabilities; what is left goes to BOS, which may not be drawn."""
    logits = torch.full([VOCAB_SIZE], -40.0)
    logits[100 : 100 + len(probabilities)] = torch.tensor(probabilities).log()
    logits[BOS] = math.log(max(1 - sum(probabilities), 1e-9))
    return logits


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def completes(data: bytes) -> int | None:
    """How many bytes the character at the end of `data` needs; None if `data` cannot become valid."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return None
        first = data[error.start]
        return (2 if first < 0xE0 else 3 if first < 0xF0 else 4) - (len(data) - error.start)
    return 0


def slow_allowed(begun: bytes, remaining: int) -> set[int]:
    """What `valid_utf8` allows after the bytes of a character that has begun."""
    found = {byte + OFFSET: completes(begun + bytes([byte])) for byte in range(256)}
    room = max(remaining, completes(begun) or 0, 1)
    allowed = {i for i, needed in found.items() if needed is not None and needed < room}
    return allowed if begun else {EOS, *allowed}


def slow_probabilities(logits: list[float], sampling: Sampling, prompt: bytes, allowed: set[int]) -> dict[int, float]:
    """The ids that may be drawn, and how likely each is."""
    penalty = float32(sampling.repetition_penalty)
    scores = {}
    for i in sorted(allowed):
        repeats = i >= OFFSET and bytes([i - OFFSET]) in prompt
        factor = 1 if not repeats else 1 / penalty if logits[i] > 0 else penalty
        scores[i] = logits[i] * factor
    best = max(scores.values())
    if best == -INF:
        scores, best = dict.fromkeys(scores, 0.0), 0.0
    likeliest_first = sorted(scores, key=lambda i: (-scores[i], i))
    if sampling.temperature == 0:
        return {likeliest_first[0]: 1.0}
    temperature = float32(sampling.temperature)
    weights = {i: math.exp((scores[i] - best) / temperature) for i in likeliest_first[: sampling.top_k]}
    if sampling.top_p is not None:
        left, share, goal = {}, 0.0, float32(sampling.top_p) * sum(weights.values())
        for i, weight in weights.items():
            if left and share >= goal:
                break
            left[i] = weight
            share += weight
            assume(sampling.top_p == 1 or abs(share - goal) > 1e-6)
        weights = left
    weights = {i: weight for i, weight in weights.items() if weight >= float32(sampling.min_p or 0)}
    return {i: weight / sum(weights.values()) for i, weight in weights.items()}


@settings(max_examples=100)
@given(st.lists(st.tuples(some_logits(), SAMPLINGS, PROMPTS, st.integers(1, 6)), min_size=1, max_size=4))
def test_weights_are_the_probabilities(each: list[tuple[Tensor, Sampling, bytes, int]]) -> None:
    rows = SamplingSlots.empty(len(each), "cpu")
    for row, (_, sampling, prompt, max_new_bytes) in enumerate(each):
        rows.put(row, sampling, torch.from_numpy(encode(prompt, eos=False)), max_new_bytes)
    weights = rows.weights(torch.stack([logits for logits, *_ in each]))
    for (logits, sampling, prompt, max_new_bytes), found in zip(each, weights, strict=True):
        allowed = {EOS, *range(OFFSET, VOCAB_SIZE)}
        if sampling.valid_utf8:
            begun = next(prompt[-n:] for n in (3, 2, 1, 0) if n == 0 or (completes(prompt[-n:]) or 0) > 0)
            allowed = slow_allowed(begun if state_after(prompt) else b"", max_new_bytes)
        expected = slow_probabilities(logits.tolist(), sampling, prompt, allowed)
        shares = found.double() / found.sum()
        assert found.max() == 1 << 30
        assert set(found.nonzero()[:, 0].tolist()) <= set(expected)
        slow = torch.tensor([expected.get(i, 0.0) for i in range(VOCAB_SIZE)], dtype=torch.float64)
        # Every weight of n is rounded by r <= 1/2, and so their sum s by nr: w / s moves by r / s and by nr / s of it.
        rounding = 0.5 * (1 + len(expected) * slow) / found.sum()
        assert ((shares - slow).abs() <= rounding + 1e-11).all()  # 1e-11: of float64, where the temperature is 1e-3


@given(st.lists(st.tuples(some_logits(), SAMPLINGS, PROMPTS), min_size=2, max_size=6), st.randoms())
def test_a_row_is_the_same_in_any_batch(each: list[tuple[Tensor, Sampling, bytes]], shuffle: Any) -> None:
    def drawn(order: list[int]) -> dict[int, list[tuple[int, float]]]:
        rows, found = SamplingSlots.empty(len(order), "cpu"), {row: [] for row in order}
        for place, row in enumerate(order):
            rows.put(place, each[row][1], torch.from_numpy(encode(each[row][2], eos=False)), 8)
        for round_number in range(3):
            ids, log_probabilities = rows.draw(torch.stack([each[row][0].roll(round_number) for row in order]))
            rows.read(ids, torch.ones(len(order), dtype=torch.bool))
            for row, *pair in zip(order, ids.tolist(), log_probabilities.tolist(), strict=True):
                found[row].append(tuple(pair))
        return found

    order = list(range(len(each)))
    alone = {row: drawn([row])[row] for row in order}
    shuffle.shuffle(order)
    assert drawn(order) == alone


def mixed_slots(device: str, num_slots: int) -> SamplingSlots:
    rows = SamplingSlots.empty(num_slots, device)
    for row in range(num_slots):
        sampling = Sampling(
            temperature=[0, 0.7, 1, 1.3][row % 4],
            top_k=[None, 3, 100][row % 3],
            top_p=[0.9, None, 0.5, 1][row // 2 % 4],
            min_p=[None, 0.02][row // 3 % 2],
            repetition_penalty=[1, 1.2][row // 5 % 2],
            seed=row % 7,
            valid_utf8=row // 4 % 2 == 0,
        )
        rows.put(row, sampling, torch.from_numpy(encode("naïve 語"[: row % 9], eos=False)), 12)
    return rows


@pytest.mark.parametrize("device", HERE)
def test_every_device_and_batch_draws_the_same(device: str) -> None:
    """And without a wait for the device, where there is one."""
    num_slots, rounds = 96, 12
    logits = (torch.randn(rounds, num_slots, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 8).round() / 4
    active = torch.rand(rounds, num_slots, generator=torch.Generator().manual_seed(1)) < 0.8
    expected, rows = [], mixed_slots("cpu", num_slots)
    for round_number in range(rounds):
        expected.append(rows.draw(logits[round_number]))
        rows.read(expected[-1][0], active[round_number])
    there, active = logits.to(device), active.to(device)
    try:
        for begin, end in [(0, num_slots), (0, 1), (40, 41), (31, 64)]:
            again = mixed_slots(device, num_slots)
            part = SamplingSlots(**{k: v[begin:end] if len(v) == num_slots else v for k, v in vars(again).items()})
            found = []
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            for round_number in range(rounds):
                found.append(part.draw(there[round_number, begin:end]))
                part.read(found[-1][0], active[round_number, begin:end])
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            for (ids, log_probabilities), (other, others) in zip(found, expected, strict=True):
                assert ids.tolist() == other[begin:end].tolist()
                torch.testing.assert_close(log_probabilities.cpu(), others[begin:end], rtol=1e-5, atol=1e-5)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_draws_and_reads() -> None:
    num_slots, rounds = 33, 10
    logits = torch.randn(rounds, num_slots, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).cuda() * 2
    rows, plain = SamplingSlots.empty(num_slots, "cuda"), mixed_slots("cuda", num_slots)
    given_logits, active = torch.zeros_like(logits[0]), torch.ones(num_slots, dtype=torch.bool, device="cuda")

    def advance() -> tuple[Tensor, Tensor]:
        ids, log_probabilities = rows.draw(given_logits)
        rows.read(ids, active)
        return ids, log_probabilities

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        advance()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = advance()
    for part, other in zip(vars(rows).values(), vars(plain).values(), strict=True):
        part.copy_(other)
    for round_number in range(rounds):
        given_logits.copy_(logits[round_number])
        active.copy_(torch.arange(num_slots, device="cuda") % 5 != round_number % 5)
        graph.replay()
        expected = plain.draw(logits[round_number])
        plain.read(expected[0], active)
        assert all(a.equal(b) for a, b in zip(drawn, expected, strict=True))
    assert all(a.equal(b) for a, b in zip(vars(rows).values(), vars(plain).values(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_temperature_zero_takes_the_likeliest(seed: int) -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    logits[SPECIAL] = 10.0
    best = max((i for i in range(VOCAB_SIZE) if i not in SPECIAL), key=lambda i: float(logits[i]))
    assert draws(logits, Sampling(temperature=0, top_p=0.9, min_p=0.1), 2) == [best, best]


def test_of_equal_logits_the_lowest_id_is_taken() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    assert draws(logits, Sampling(temperature=0), 3) == [EOS] * 3
    logits[EOS] = -1
    assert draws(logits, Sampling(temperature=0), 3) == [OFFSET] * 3
    assert set(draws(logits, Sampling(temperature=1, top_k=3), 200)) == {OFFSET, OFFSET + 1, OFFSET + 2}


def test_special_ids_are_never_drawn_but_eos_is() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[:4] = 5.0
    for sampling in (Sampling(temperature=1), Sampling(temperature=1, top_k=3), Sampling(temperature=1, top_p=0.5)):
        drawn = set(draws(logits, sampling, 200))
        assert not drawn & set(SPECIAL)
        assert EOS in drawn


def test_drawing_changes_nothing() -> None:
    rows = mixed_slots("cpu", 20)
    logits = torch.randn(20, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    before, was = {name: part.clone() for name, part in vars(rows).items()}, logits.clone()
    first = rows.draw(logits)
    assert all(a.equal(b) for a, b in zip(first, rows.draw(logits), strict=True))
    assert logits.equal(was)
    assert all(part.equal(before[name]) for name, part in vars(rows).items())


@MANY
@given(some_logits(), SAMPLINGS)
def test_log_probabilities_are_the_models_own(logits: Tensor, sampling: Sampling) -> None:
    assume(logits.max() > -INF)
    ids, found = one_row(sampling, b"abc").draw(logits[None])
    assert float(found) == pytest.approx(float(logits[ids].double() - logits.double().logsumexp(0)), abs=1e-5)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"top_k": 1}, {100}),
        ({"top_k": 2}, {100, 101}),
        ({"top_k": 1000}, {100, 101, 102, 103}),
        ({"top_p": 0.3}, {100}),
        ({"top_p": 0.41}, {100, 101}),  # the first that reaches the share is still in
        ({"top_p": 0.75}, {100, 101, 102}),
        ({"top_p": 1.0}, {100, 101, 102, 103}),
        ({"top_p": 0.75, "top_k": 2}, {100, 101}),
        ({"top_p": 0.55, "top_k": 2}, {100}),  # 0.4 of the 0.7 that are left
        ({"top_p": 1e-60}, {100}),
        ({"min_p": 0.2}, {100, 101, 102, 103}),
        ({"min_p": 0.3}, {100, 101, 102}),
        ({"min_p": 0.6}, {100, 101}),
        ({"min_p": 1}, {100}),
        ({"min_p": 0.3, "temperature": 0.5}, {100, 101}),  # the temperature comes first
        ({"min_p": 0.3, "top_k": 2}, {100, 101}),
    ],
)
def test_what_is_left(sampling: dict[str, float], allowed: set[int]) -> None:
    logits = few_likely(0.4, 0.3, 0.2, 0.1)
    assert set(draws(logits, Sampling.parse({"temperature": 1, **sampling}), 200)) == allowed


def test_a_share_that_is_reached_exactly_is_enough() -> None:
    logits = torch.full([VOCAB_SIZE], -INF)
    logits[100:104] = 0
    assert set(draws(logits, Sampling(temperature=1, top_p=0.5), 200)) == {100, 101}


@pytest.mark.parametrize(
    ("sampling", "probabilities"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        # p^(1/T), normalised again
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9]),
        ({"temperature": 1.0, "min_p": 0.3}, [4 / 9, 3 / 9, 2 / 9]),
    ],
)
def test_frequencies(sampling: dict[str, float], probabilities: list[float]) -> None:
    """Chi-square; the bounds are the 99.9 % points for one to three degrees of freedom."""
    count = 8000
    # BOS would be as likely as all the others together; what is left when it is ruled out keeps its proportions.
    counts = Counter(draws(few_likely(0.2, 0.15, 0.1, 0.05), Sampling.parse(sampling), count))
    expected = [count * p for p in probabilities]
    statistic = sum((counts[100 + i] - e) ** 2 / e for i, e in enumerate(expected))
    assert sum(counts[100 + i] for i in range(len(expected))) == count
    assert statistic < {2: 10.83, 3: 13.82, 4: 16.27}[len(expected)]


def test_frequencies_of_all_ids() -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    count = 20_000
    found = torch.bincount(torch.tensor(draws(logits, Sampling(temperature=1), count)), minlength=VOCAB_SIZE)
    logits[SPECIAL] = -INF
    expected = logits.softmax(0).double() * count
    assert found[SPECIAL].tolist() == [0, 0, 0]
    assert near_uniform(found[expected > 0], expected[expected > 0])


@pytest.mark.parametrize(("number", "first"), [(0, True), ((1 << 24) - 1, False)])
def test_the_smallest_and_the_largest_random_number(monkeypatch: pytest.MonkeyPatch, number: int, first: bool) -> None:
    """They draw the first and the last id that is left, however unlikely, and none beyond."""
    monkeypatch.setattr(module, "random_numbers", lambda seed, drawn: torch.full_like(seed, number))
    logits = torch.full([VOCAB_SIZE], -INF)
    logits[[50, 60, 70]] = torch.tensor([0.0, 3.0, 0.0])
    assert draws(logits, Sampling(temperature=1), 1) == [50 if first else 70]
    logits[[50, 70]] = -INF
    assert draws(logits, Sampling(temperature=1), 1) == [60]
    assert draws(torch.randn(VOCAB_SIZE), Sampling(temperature=1), 1) == [EOS if first else VOCAB_SIZE - 1]


@MANY
@given(SAMPLINGS, st.sampled_from([-INF, INF, math.nan, 3e38, -3e38]), st.booleans())
def test_extreme_logits_draw_something_allowed(sampling: Sampling, value: float, alone: bool) -> None:
    logits = torch.full([1, VOCAB_SIZE], value)
    if alone:
        logits[0, [10, 80, 81]] = 0
    rows = one_row(sampling, b"L")
    assert not bool(rows.ruled_out()[0, rows.draw(logits)[0]])


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", [5e-324, 1e-40, 1e300])
def test_extreme_settings_draw_something_allowed(name: str, value: float) -> None:
    rows = one_row(Sampling.parse({"temperature": 1, name: value}), bytes(range(256)))
    logits = torch.linspace(-1, 1, VOCAB_SIZE)[None]
    weights = rows.weights(logits)
    assert (weights >= 0).all()
    assert weights.sum() > 0
    assert not bool(rows.ruled_out()[0, rows.draw(logits)[0]])


def near_uniform(found: Tensor, expected: Tensor | float) -> bool:
    """Chi-square within five standard deviations of what it should be."""
    freedom = found.numel() - 1
    statistic = float(((found - expected) ** 2 / expected).sum())
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_random_numbers_are_uniform_and_unrelated() -> None:
    """Over counters of one seed and over seeds, in their highest and lowest bits, and beside their neighbours."""
    count = 1 << 18
    run, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    for seed in (0, 1, -1, 12345, (1 << 63) - 1):
        same = torch.full_like(run, seed)
        for one, other in (
            (random_numbers(same, run), random_numbers(same, run + 1)),
            (random_numbers(same, run), random_numbers(same - 1, run)),
            (random_numbers(run + same, zero), random_numbers(run + same + 1, zero)),
            (random_numbers(run + same, zero + 3), random_numbers(run + same, zero + 4)),
        ):
            assert int(one.min()) >= 0
            assert int(one.max()) < 1 << 24
            for shift in (16, 8, 0):
                assert near_uniform(((one >> shift) & 255).bincount(minlength=256), count / 256)
            for shift in (20, 0):
                pair = ((one >> shift) & 15) * 16 + ((other >> shift) & 15)
                assert near_uniform(pair.bincount(minlength=256), count / 256)


def test_random_numbers_are_those_of_splitmix() -> None:
    wrap = (1 << 64) - 1

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        return z ^ (z >> 31)

    def splitmix(state: int, count: int) -> list[int]:
        return [mixed((state + n * 0x9E3779B97F4A7C15) & wrap) for n in range(1, count + 1)]

    # The published generator's first numbers from seed 1234567.
    assert splitmix(1234567, 2) == [6457827717110365317, 3203168211198807973]
    for seed in (0, 1, 1234567, -1, -(1 << 63), (1 << 63) - 1):
        found = random_numbers(torch.full([50], seed), torch.arange(50)).tolist()
        assert found == [number >> 40 for number in splitmix(mixed(seed & wrap), 50)]


def test_seed() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    assert draws(logits, Sampling(seed=1), 20) == draws(logits, Sampling(seed=1), 20)
    assert draws(logits, Sampling(seed=1), 20) != draws(logits, Sampling(seed=2), 20)
    assert draws(logits, Sampling(seed=(1 << 64) - 1), 20) == draws(logits, Sampling(seed=-1), 20)


def test_put_and_read() -> None:
    rows = SamplingSlots.empty(3, "cpu")
    rows.put(1, Sampling(seed=7, top_k=5), torch.tensor([BOS, ord("x") + OFFSET]), 9)
    rows.read(torch.tensor([70, 70, 70]), torch.tensor([False, True, False]))
    prompt = torch.from_numpy(encode("aé", eos=False))[:-1]
    rows.put(1, Sampling(seed=8), prompt, 2)  # nothing is left of what was in the row
    seen = set(prompt[1:].tolist())
    assert rows.seen[1].nonzero()[:, 0].tolist() == sorted(seen)
    assert (int(rows.utf8[1]), int(rows.top_k[1])) == (state_after(b"\xc3"), VOCAB_SIZE)
    rows.read(torch.tensor([70, 0xA9 + OFFSET, 80]), torch.tensor([False, True, False]))
    assert rows.seen[1].nonzero()[:, 0].tolist() == sorted({*seen, 0xA9 + OFFSET})
    assert not rows.seen[[0, 2]].any()
    assert rows.drawn.tolist() == [0, 1, 0]
    assert rows.remaining.tolist() == [0, 1, 0]
    assert rows.utf8.tolist() == [0, 0, 0]
    rows.read(torch.tensor([EOS, EOS, EOS]), torch.tensor([True, True, True]))
    assert not rows.seen[:, :OFFSET].any()


@MANY
@given(st.lists(PROMPTS, max_size=3), PROMPTS, st.booleans())
def test_what_was_read_is_as_if_it_stood_in_the_prompt(before: list[bytes], data: bytes, border: bool) -> None:
    """Bytes of one text are one run; before a special id another text ends."""
    prompt = torch.cat([torch.from_numpy(encode(part, eos=border, bos=border)) for part in [*before, b""]])
    rest = torch.from_numpy(encode(data, bos=False, eos=False))
    at_once, bit_by_bit = SamplingSlots.empty(1, "cpu"), SamplingSlots.empty(1, "cpu")
    at_once.put(0, Sampling(), torch.cat([prompt, rest]), 3)
    bit_by_bit.put(0, Sampling(), prompt, 3)
    for i in rest:
        bit_by_bit.read(i[None], torch.ones(1, dtype=torch.bool))
    assert bit_by_bit.seen.equal(at_once.seen)
    assert int(bit_by_bit.utf8) == int(at_once.utf8) == state_after(data if border else b"".join([*before, data]))


def test_penalty() -> None:
    logits = torch.full([VOCAB_SIZE], -9.0)
    logits[[EOS, 100, 101]] = torch.tensor([2.0, 2.4, -1.0])
    prompt = bytes([100 - OFFSET, 101 - OFFSET])
    plain, penalised = one_row(Sampling(temperature=1)), one_row(Sampling(temperature=1, repetition_penalty=2), prompt)
    penalised.read(torch.tensor([EOS]), torch.tensor([True]))  # which is never penalised
    for rows, expected in ((plain, [2.0, 2.4, -1.0]), (penalised, [2.0, 1.2, -2.0])):
        weights = rows.weights(logits[None])[0, [EOS, 100, 101]]
        torch.testing.assert_close(
            weights / weights[0], (torch.tensor(expected) - 2).exp(), check_dtype=False, rtol=1e-5, atol=0
        )


def test_something_is_always_allowed_and_every_character_can_be_finished() -> None:
    """In all states, with room for any number of bytes; without enough of it, too."""
    ways = {state_after(begun): begun for begun in (b"", b"\xc2", b"\xe0", b"\xe1", b"\xed", b"\xf0", b"\xf1", b"\xf4")}
    assert sorted(ways) == list(range(len(NEEDED) - 1))
    for state, begun in ways.items():
        for remaining in range(7):
            rows = one_row(Sampling(valid_utf8=True), begun, remaining)
            allowed = (~rows.ruled_out()[0]).nonzero()[:, 0].tolist()
            assert set(allowed) == slow_allowed(begun, remaining)
            assert allowed
            if remaining >= max(NEEDED[state], 1):
                after = [0 if i == EOS else int(TRANSITIONS[state, i - OFFSET]) for i in allowed]
                assert all(NEEDED[s] < remaining for s in after)


def test_a_row_of_any_length_modes_out_what_is_no_utf8() -> None:
    allowed = ~one_row(Sampling(valid_utf8=True), b"\xc3", max_new_bytes=MAX_NEW_BYTES).ruled_out()[0]
    assert (allowed.nonzero()[:, 0] - OFFSET).tolist() == [*range(0x80, 0xC0)]


def test_valid_utf8_comes_out() -> None:
    """Whatever the model says, whatever the prompt ends with and whenever it is cut off."""
    prompts = [b"", "é".encode(), b"\xff\xfe", "語".encode()[:1], "🙂".encode()[:2], b"\xed\xa0"]
    num_slots, most = 240, 9
    rows = SamplingSlots.empty(num_slots, "cpu")
    texts = [prompts[row % len(prompts)] for row in range(num_slots)]
    for row, text in enumerate(texts):
        room = max(row % most + 1, int(NEEDED[state_after(text)]))
        rows.put(
            row, Sampling(temperature=1, seed=row, valid_utf8=True), torch.from_numpy(encode(text, eos=False)), room
        )
    logits = torch.zeros(num_slots, VOCAB_SIZE)
    logits[:, OFFSET + 0x80 :] = 3  # or hardly any character would be of more than a byte
    ended = [False] * num_slots
    lengths: Counter[int] = Counter()
    for _ in range(most):
        active = ~torch.tensor(ended) & (rows.remaining > 0)
        ids, _ = rows.draw(logits)
        rows.read(ids, active)
        for row in active.nonzero()[:, 0].tolist():
            texts[row] += decode([int(ids[row])])
            ended[row] = int(ids[row]) == EOS
    for row, text in enumerate(texts):
        begun = prompts[row % len(prompts)]
        valid = text[len(begun) :] if state_after(begun) == 0 else text
        lengths.update(len(character.encode()) for character in valid.decode())
    assert set(lengths) == {1, 2, 3, 4}
    assert any(ended)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": INF},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": INF},
        {"stop": ["a", ""]},
        {"stop": [b""]},
        {"stop": 3},
        {"topk": 1},
    ],
)
def test_wrong_values(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(values))) as error:
        Sampling.parse(values)
    assert "\n" not in str(error.value)


def test_stop_texts_as_plain_values() -> None:
    sampling = Sampling(stop=["é", b"\xff\n", b"\n"])
    again = Sampling.parse(sampling.plain())
    assert [to_bytes(stop) for stop in again.stop] == ["é".encode(), b"\xff\n", b"\n"]


ACCEPTED: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.3,
    "seed": 7,
    "stop": ["end"],
    "valid_utf8": True,
}
REFUSED: dict[str, Any] = {
    "temperature": -1,
    "top_k": 0,
    "top_p": 1.5,
    "min_p": -0.1,
    "repetition_penalty": 0,
    "seed": 2**64,
    "stop": [""],
    "valid_utf8": "perhaps",
}


def test_every_setting_has_a_value_that_is_accepted_and_one_that_is_refused() -> None:
    assert set(ACCEPTED) == set(REFUSED) == set(Sampling.model_fields)
    for name, value in ACCEPTED.items():
        assert getattr(Sampling(**{name: value}), name) == value
        with pytest.raises(UserError, match=name):
            Sampling.parse({name: REFUSED[name]})


def test_every_setting_reaches_the_slots_and_the_device() -> None:
    """The kernel has a parameter for each, and reads it."""
    assert set(module.OPTIONS) | module.BY_ENGINE == set(Sampling.model_fields)
    assert set(module.OPTIONS) == set(VALUES), "a setting is tried among all others"
    source = inspect.getsource(device_sampling).partition("def draw_kernel(")[2]
    for field in fields(SamplingSlots):
        if field.name not in device_sampling.PLAIN_FIELDS:
            assert len(re.findall(rf"\b{field.name}_ptr\b", source)) > 1, field.name
    slots = SamplingSlots.empty(1, "cpu")
    slots.put(0, Sampling(**ACCEPTED), torch.tensor([1]), 5)
    for name, option in module.OPTIONS.items():
        held = getattr(slots, name)
        assert held.dtype == option.dtype
        assert held.item() == pytest.approx(ACCEPTED[name])
        assert held.item() != option.neutral


@pytest.mark.parametrize("name", module.OPTIONS)
def test_every_setting_changes_what_is_drawn(name: str) -> None:
    """Even alone; and its place among the others is described."""
    logits, text = 2 * torch.randn(50, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)), bytes(range(0, 256, 2))
    drawn = []
    for values in ({"temperature": 1.0}, {"temperature": 1.0, name: ACCEPTED[name]}):
        slots = one_row(Sampling(**values), text)
        found = [slots.draw(row[None])[0] for row in logits]
        drawn.append(torch.cat(found).tolist())
    assert drawn[0] != drawn[1]
    order = (Sampling.__doc__ or "").partition("In this order:")[2].partition(".")[0]
    assert name == "seed" or f"`{name}`" in order
