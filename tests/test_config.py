from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from bytelatent.config import Settings, load_yaml
from bytelatent.errors import UserError


class Optimizer(Settings):
    lr: float = 4e-4
    betas: list[float] = Field(default=[0.9, 0.95])
    clip: float | None = 1.0


class Source(Settings):
    name: str
    weight: float = 1.0


class Run(Settings):
    steps: int = Field(default=10, ge=1)
    note: str = ""
    place: Path | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    optimizer: Optimizer = Optimizer()
    second: Optimizer | None = None
    sources: list[Source] = Field(default=[])
    named: dict[str, Source] = Field(default={})
    counts: dict[str, int] = Field(default={})
    compile: bool | Literal["auto"] = "auto"


def one_line(action: Callable[[], object]) -> str:
    """The message of the UserError that `action` raises, which is one line."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"stepz": 1}, "stepz", "steps"),
        ({"optimiser": {}}, "optimiser", "optimizer"),
        ({"optimizer": {"beta": [1]}}, "optimizer.beta", "betas"),
        ({"second": {"clipp": 1}}, "second.clipp", "clip"),
        ({"sources": [{"name": "a"}, {"name": "b", "wieght": 2}]}, "sources.1.wieght", "weight"),
        ({"named": {"books": {"name": "b", "wieght": 2}}}, "named.books.wieght", "weight"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, object], key: str, nearest: str) -> None:
    message = one_line(lambda: Run.parse(values, "run.yaml"))
    assert message == f"run.yaml: {key}: unknown key; did you mean '{nearest}'?"


def test_an_unknown_key_near_none_lists_the_known_ones_of_its_group() -> None:
    message = one_line(lambda: Run.parse({"optimizer": {"zzzzzzzz": 1}}))
    assert message == "optimizer.zzzzzzzz: unknown key; known here: betas, clip, lr"


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"steps": "many"}, ["steps: ", "integer", "'many'"]),
        ({"steps": 0}, ["steps: ", "greater than or equal to 1", "not 0"]),
        ({"precision": "fp8"}, ["precision: ", "'float32'", "'fp8'"]),
        ({"optimizer": {"lr": [1]}}, ["optimizer.lr: ", "number", "[1]"]),
        ({"optimizer": "adam"}, ["optimizer: ", "'adam'"]),
        ({"sources": [{"weight": 1}]}, ["sources.0.name: ", "required"]),
        ({"steps": "two\nlines"}, ["steps: ", r"'two\nlines'"]),
        ({"a\nkey of two lines": 1}, ["unknown key"]),
        ({"note": 123}, ["note: ", ", not 123; in double quotes it is a text"]),
        ({"note": True}, ["not True; in double quotes"]),
        ({"note": None}, ["not None; in double quotes"]),
        ({"place": 5}, ["not 5; in double quotes"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr: ", "finite number", "nan"]),
        ({"optimizer": {"clip": float("inf")}}, ["optimizer.clip: ", "finite number", "inf"]),
        ({"steps": 10**30}, ["steps: ", f"at most {2**64 - 1}", str(10**30)]),
        ({"clip": 1}, ["clip: unknown key", "did you mean 'optimizer.clip' or 'second.clip'?"]),
        ({"steps": "x", "note": 3}, ["steps: ", "(and 1 more)"]),
        ({"compile": "maybe"}, ["compile: Input", "boolean", "or Input should be 'auto', not 'maybe'"]),
    ],
)
def test_a_wrong_value_names_the_key_and_the_value(values: dict[str, object], parts: list[str]) -> None:
    message = one_line(lambda: Run.parse(values, "run.yaml"))
    assert message.startswith("run.yaml: ")
    for part in parts:
        assert part in message


def test_only_what_quotes_would_mend_is_reported_to_be_quoted() -> None:
    assert "quotes" not in one_line(lambda: Run.parse({"note": [1]}))
    assert "quotes" not in one_line(lambda: Run.parse({"steps": "many"}))


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Run().steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "absent.yaml' does not exist" in one_line(lambda: load_yaml(tmp_path / "absent.yaml"))
    assert str(tmp_path) in one_line(lambda: load_yaml(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: 1\na: 2",
        "a: ${nowhere}",
        "a: ${",
        "- 1\n- 2",
        "5",
        "true",
        "2.5",
        "\0",
        b"\xff\xfe\xff",
        "a: &x [*x]",
    ],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str | bytes) -> None:
    path = written(tmp_path, text)
    assert str(path) in one_line(lambda: load_yaml(path))


def test_a_file_is_read_as_plain_values(tmp_path: Path) -> None:
    path = written(tmp_path, "steps: 3\noptimizer: {lr: 1e-4, betas: [0.5, 1]}\nnote: ${steps} steps\nsecond: null\n")
    expected = {"steps": 3, "optimizer": {"lr": 1e-4, "betas": [0.5, 1]}, "note": "3 steps", "second": None}
    assert load_yaml(path) == expected
    assert load_yaml(written(tmp_path, "")) == {}


texts = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.text("$\\{}a:.", max_size=9)
    | st.sampled_from(
        [
            "1e5",
            "1e-4",
            "12e45",
            ".5",
            "1_000",
            "0x1f",
            "0b1",
            "017",
            "12:30:45",
            "on",
            "No",
            "~",
            "null",
            "inf",
            ".nan",
            "",
        ]
    )
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
optimizers = st.builds(Optimizer, lr=numbers, betas=st.lists(numbers, max_size=3), clip=st.none() | numbers)
sources = st.builds(Source, name=texts, weight=numbers)
runs = st.builds(
    Run,
    steps=st.integers(1, 10**12),
    note=texts,
    precision=st.sampled_from(["float32", "bfloat16"]),
    optimizer=optimizers,
    second=st.none() | optimizers,
    sources=st.lists(sources, max_size=2),
    named=st.dictionaries(texts, sources, max_size=2),
    counts=st.dictionaries(texts, st.integers(), max_size=2),
)


@given(runs)
def test_settings_written_as_yaml_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(run.to_yaml(), encoding="utf-8")
    assert Run.parse(load_yaml(path)) == run
    assert Run.parse(run.plain()) == run
