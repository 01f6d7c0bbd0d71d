import copy
import re
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.evaluation.noise import NOISES, Noise, noises_of, noisy_arguments, with_noise

TEXT = "The quick brown fox jumps over the lazy dog."
ANY_NAME = st.sampled_from(sorted(NOISES))
RATE = st.floats(0, 1)
LONE = {chr(0xDC00 + byte) for byte in range(0x80, 0x100)}  # stand for bytes that are not UTF-8


@pytest.mark.parametrize(
    ("name", "rate", "first", "second", "changed"),
    [
        ("antspeak", 1.0, [0, 0, 0, 0], [0, 0, 0, 0], "A B   D"),
        ("antspeak", 0.5, [0.1, 0.6, 0.2, 0.5], [0, 0, 0, 0], "Ab  d"),
        ("drop", 0.1, [0.05, 0.1, 0.09, 0.9], [0, 0, 0, 0], "bd"),
        ("randomcase", 0.5, [0.7, 0.2, 0.1, 0.5], [0, 0, 0, 0], "aB d"),
        ("repeat", 0.2, [0.1, 0.3, 0.19, 0.0], [0.0, 0.0, 0.34, 0.99], "aab   dddd"),
        ("uppercase", 0.5, [0.4, 0.6, 0.6, 0.5], [0, 0, 0, 0], "Ab d"),
    ],
)
def test_examples_by_hand(name: str, rate: float, first: list[float], second: list[float], changed: str) -> None:
    assert "".join(NOISES[name].change("ab d", first, second, rate)) == changed


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("antspeak", "T H E   Q U I C K   B R O W N   F O X   J U M P S   O V E R   T H E   L A Z Y   D O G ."),
        ("drop", "he quick brown foxjups overthelazy dog."),
        ("randomcase", "THE QuicK BROwN FOX JUmPS oveR tHE Lazy dOG."),
        ("repeat", "Thhhhe quicck broooown fox jjjuuuumps ovvver tthe lazy dogg."),
        ("uppercase", "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG."),
    ],
)
def test_the_same_on_every_machine(name: str, changed: str) -> None:
    """At the paper's rates, as written down once."""
    assert noises_of([name])[0](TEXT) == changed


@given(ANY_NAME, RATE, st.integers(0, 99), st.text())
def test_the_same_for_the_same_seed(name: str, rate: float, seed: int, text: str) -> None:
    assert Noise(name, rate, seed)(text) == Noise(name, rate, seed)(text)
    assert Noise(name, 0.0, seed)(text) == text


@given(st.text(), st.integers(0, 9))
def test_upper_case_twice_is_upper_case(text: str, seed: int) -> None:
    once = Noise("uppercase", 1.0, seed)(text)
    assert once == Noise("uppercase", 1.0, seed)(once) == "".join(map(str.upper, text))


@given(ANY_NAME, RATE, st.binary(max_size=40))
def test_bytes_that_are_not_utf8_stay(name: str, rate: float, data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    changed = Noise(name, rate)(text)
    assert [c for c in changed if c in LONE] == [c for c in text if c in LONE]
    assert Noise(name, rate)(data) == changed.encode("utf-8", "surrogateescape")


def test_bytes_by_hand() -> None:
    assert Noise("antspeak", 1.0)(b"a\xffb") == b"A\xff B"
    assert Noise("drop", 1.0)(b"a\xff\xc3b") == b"\xff\xc3"
    assert set(Noise("repeat", 1.0)("é\udcff")) == {"é", "\udcff"}
    assert Noise("repeat", 1.0)("é\udcff").count("\udcff") == 1


def test_a_higher_rate_changes_more() -> None:
    text = TEXT * 500
    dropped = [Noise("drop", rate, 3)(text) for rate in (0.05, 0.1, 0.3)]
    for share, shorter in zip((0.05, 0.1, 0.3), dropped, strict=True):
        assert 1 - len(shorter) / len(text) == pytest.approx(share, abs=0.015)  # more than five standard deviations
    letters = iter(dropped[1])
    assert all(letter in letters for letter in dropped[2])  # what 0.1 drops, 0.3 drops too
    repeated = Noise("repeat", 0.2)(text)
    assert len(repeated) / len(text) == pytest.approx(1.4, abs=0.03)  # two more on average
    cases = Noise("randomcase", 0.5)(text)
    assert sum(map(str.isupper, cases)) / sum(map(str.isalpha, text)) == pytest.approx(0.5, abs=0.02)
    assert Noise("drop", 0.1, 1)(text) != Noise("drop", 0.1, 2)(text)


@given(st.text(st.characters(codec="ascii")), RATE, st.integers(0, 9))
def test_case_is_all_that_random_case_changes(text: str, rate: float, seed: int) -> None:
    assert Noise("randomcase", rate, seed)(text).lower() == text.lower()
    runs = re.findall(r"(.)\1*", Noise("repeat", rate, seed)("abc" * 5), re.DOTALL)
    assert "".join(runs) == "abc" * 5


def test_names_and_rates() -> None:
    assert [str(noise) for noise in noises_of(["drop:0.05", "Repeat", "drop:.05"])] == ["drop:0.05", "repeat:0.2"]
    assert [str(noise) for noise in noises_of(["drop"], [0, 0.5])] == ["drop:0", "drop:0.5"]
    assert [noise.name for noise in noises_of(["all"])] == sorted(NOISES)
    assert all(noise.rate == NOISES[noise.name].rate for noise in noises_of(["all"]))


@pytest.mark.parametrize(
    ("given", "rates", "message"),
    [
        (["dorp"], None, "noise: 'dorp' is unknown; did you mean 'drop'?"),
        (["xyz"], None, "noise: 'xyz' is unknown; there are antspeak, drop, randomcase, repeat, uppercase, and all"),
        (["drop:2"], None, "noise: '2' is not a rate; write a number from 0 to 1, as in drop:0.1"),
        (["drop:"], None, "noise: '' is not a rate"),
        (["drop:nan"], None, "noise: 'nan' is not a rate"),
        (["drop:0.1"], [0.2], "noise: 'drop:0.1' has a rate, and so has --noise-rates; give one of them"),
        ([], [0.2], "noise-rates: there is no noise to have them"),
    ],
)
def test_bad_noise(given: list[str], rates: list[float] | None, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        noises_of(given, rates)


@pytest.mark.parametrize(
    ("kind", "arguments", "on", "changed"),
    [
        ("loglikelihood", ("ab", " cd"), "both", ("AB", " CD")),
        ("loglikelihood", ("ab", " cd"), "prompt", ("AB", " cd")),
        ("loglikelihood", ("ab", " cd"), "completion", ("ab", " CD")),
        ("loglikelihood_rolling", ("ab",), "both", ("AB",)),
        ("loglikelihood_rolling", ("ab",), "completion", ("AB",)),
        ("loglikelihood_rolling", ("ab",), "prompt", ("ab",)),
        ("generate_until", ("ab", {"until": ["\n"]}), "both", ("AB", {"until": ["\n"]})),
        ("generate_until", ("ab", {"until": ["\n"]}), "completion", ("ab", {"until": ["\n"]})),
    ],
)
def test_arguments_of_requests(kind: str, arguments: tuple[Any, ...], on: Any, changed: tuple[Any, ...]) -> None:
    assert noisy_arguments(kind, arguments, Noise("uppercase", 1.0), on) == changed


def test_a_completion_does_not_become_empty() -> None:
    drop = Noise("drop", 1.0)
    assert noisy_arguments("loglikelihood", ("ab", " cd"), drop, "both") == ("", " cd")
    assert noisy_arguments("loglikelihood", ("ab", ""), drop, "both") == ("", "")


@dataclass
class Request:
    arguments: tuple[Any, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


class Echo:
    """Has the methods of an LM of lm-eval, and answers what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def loglikelihood(self, requests: list[Request], disable_tqdm: bool = False) -> list[Any]:
        self.asked += [request.args for request in requests]
        return [(request.args, disable_tqdm) for request in requests]

    def loglikelihood_rolling(self, requests: list[Request]) -> list[Any]:
        return [request.args for request in requests]

    generate_until = loglikelihood_rolling


def test_a_model_gets_noise_and_its_requests_stay() -> None:
    lm, requests = Echo(), [Request(("ab", " cd")), Request(("x", " y"))]
    before = copy.deepcopy(requests)
    noisy = with_noise(lm, Noise("uppercase", 1.0), "completion")
    assert isinstance(noisy, Echo)
    assert noisy.loglikelihood(requests, disable_tqdm=True) == [(("ab", " CD"), True), (("x", " Y"), True)]
    assert noisy.generate_until([Request(("ab", {}))]) == [("ab", {})]
    assert noisy.loglikelihood_rolling([Request(("ab",))]) == [("AB",)]
    assert requests == before
    assert lm.loglikelihood(requests) == [(("ab", " cd"), False), (("x", " y"), False)]
