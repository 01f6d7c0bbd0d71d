"""What `key=value` is read as: by the type of the setting, and as it was typed where that is a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from bytelatent.command_line import ParsedSettings, from_command_line
from bytelatent.config import Settings, load_yaml, to_yaml
from bytelatent.errors import UserError


class Source(Settings):
    path: str
    weight: float = 1.0


class Run(Settings):
    run: str = ""
    note: str | None = None
    place: Path | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool | Literal["auto"] = "auto"
    steps: int | None = None
    rate: float = 1.0
    sources: list[Source] = Field(default=[])
    names: list[str] = Field(default=[])
    sizes: list[int] = Field(default=[])
    counts: dict[str, int] = Field(default={})
    first: Source | None = None


def values(*overrides: str, model: type[Settings] = Run, below: dict[str, object] | None = None) -> dict[str, object]:
    given = ParsedSettings(model, below or {})
    given.lay_over(list(overrides))
    return given.values


def read(*overrides: str) -> Run:
    return Run.parse(values(*overrides))


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


TYPED = [
    *("rr/exp #3", "0123", "*.jsonl", "&x", "!tag", "@at", "%d", "a\tb", " a ", "a: b", "- a", "key: [", "{", "[a"),
    *(
        "1e5",
        "true",
        "~",
        "",
        "?",
        "|",
        ">",
        "`",
        "a\nb",
        "\u00e9\U0001f600",
        "${x}",
        "\\${x}",
        "=",
        "a=b",
        "#",
        "null",
    ),
    *("[ab]*.txt]", "{a,b}", "[1, 2]", "'", '"', "it's", 'say "x"', "12:30:45", "0x1f", "1_000", "nan", ".inf", "on"),
]


@pytest.mark.parametrize("text", TYPED)
def test_a_text_stays_what_was_typed(text: str, tmp_path: Path) -> None:
    run = read(f"run={text}", f"place=x{text}", f"first.path={text}")
    assert run.run == text
    assert run.place == Path(f"x{text}")
    assert run.first is not None
    assert run.first.path == text
    path = tmp_path / "settings.yaml"
    path.write_text(run.to_yaml(), encoding="utf-8")
    assert Run.parse(load_yaml(path)) == run


@pytest.mark.parametrize(
    "text", [text for text in TYPED if text[:1] + text[-1:] not in ("[]", "{}") and text != "null"]
)
def test_a_text_may_be_given_for_a_group_or_a_list(text: str) -> None:
    assert values(f"sources={text}") == {"sources": text}


@given(st.text(max_size=12))
def test_any_text_that_is_not_in_quotes_stays(text: str) -> None:
    if text[:1] != text[-1:] or text[:1] not in ("'", '"'):
        assert read(f"run={text}").run == text


def test_a_whole_text_in_quotes_is_the_text_within() -> None:
    assert read('run="0123"').run == "0123"
    assert read("run='it''s'").run == "it's"
    assert read('note="null"').note == "null"
    assert read('run="a\\nb"').run == "a\nb"


def test_null_is_none_where_there_may_be_none() -> None:
    assert values("run=null", "note=null", "place=null", "steps=null", "first=null", "steps=~") == {
        "run": "null",
        **dict.fromkeys(("note", "place", "steps", "first")),
    }


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=010", 10),
        ("steps=1e3", 1000),
        ("steps=1_000", 1000),
        ("rate=4E-3", 0.004),
        ("rate=.5", 0.5),
        ("rate=-2", -2.0),
        ("compile=true", True),
        ("compile=False", False),
        ("compile=auto", "auto"),
        ("precision=bfloat16", "bfloat16"),
        ("sizes=[1, 2]", [1, 2]),
        ("names=[1, 0123, 'null', a#b]", ["1", "0123", "null", "a#b"]),
        ("counts={a: 1, 2: 3}", {"a": 1, "2": 3}),
        ("sources=[{path: 0123, weight: 2}, {path: b}]", [Source(path="0123", weight=2), Source(path="b")]),
        ('first={"path": "\u00e9", "weight": 1e-3}', Source(path="\u00e9", weight=1e-3)),
    ],
)
def test_other_values_are_read_by_their_type(override: str, value: object) -> None:
    found = getattr(read(override), override.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("4E3", 4000.0),
        ("7", 7),
        ("-7", -7),
        ("0123", "0123"),
        ("true", True),
        ("null", None),
        ("", ""),
        ("[1, 2.5, x]", [1, 2.5, "x"]),
        ("{b: 1}", {"b": 1}),
        ("some text", "some text"),
        ("'7'", "7"),
        ("exp #3", "exp #3"),
        ("s3://a/b?c=d", "s3://a/b?c=d"),
        ("def read(self, path):", "def read(self, path):"),
    ],
)
def test_what_nobody_declares_is_read_by_its_form(text: str, value: object) -> None:
    found = values(f"a={text}", f"b.c.d={text}", model=Settings)
    assert found == {"a": value, "b": {"c": {"d": value}}}
    assert type(found["a"]) is type(value)


def test_values_are_laid_over_what_is_there() -> None:
    below = {"steps": 1, "first": {"path": "a", "weight": 2.0}, "sources": [{"path": "a"}]}
    assert values(below=dict(below)) == below
    assert values("first.weight=3", "steps=5", "steps=6", below=dict(below)) == {
        "steps": 6,
        "first": {"path": "a", "weight": 3},
        "sources": [{"path": "a"}],
    }
    assert below["first"] == {"path": "a", "weight": 2.0}


@pytest.mark.parametrize("override", ["steps", "--steps", "=3", "", "a.=3", ".a=3", "a..b=3"])
def test_a_setting_is_a_key_and_a_value(override: str) -> None:
    assert one_line(lambda: values("note=x", override)).startswith(f"'{override}' is not a setting")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources=[*a]", "sources: '[*a]' is no list or mapping ("),
        ("first={path: a, path: b}", "first.path: it is given twice"),
        ("sources.0.path=b", "sources.0.path: sources is [{'path': 'a'}], which has no keys; set it whole: sources="),
        ("names=[&a [*a]]", "names: '[&a [*a]]' is no list or mapping ("),
        ("sizes=[\0]", "sizes: '[\\x00]' is no list or mapping ("),
    ],
)
def test_what_cannot_be_read_is_named(override: str, message: str) -> None:
    assert one_line(lambda: values(override, below={"sources": [{"path": "a"}]})).startswith(message)


def test_nothing_given_is_dropped_silently() -> None:
    message = one_line(lambda: values("first.weight=2", "first={path: a}"))
    assert message == "'first={path: a}' comes after first.weight=... and would drop it; write it first"
    assert values("first={path: a}", "first.weight=2") == {"first": {"path": "a", "weight": 2}}


def test_two_files_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text("steps: 1\n")
    message = one_line(lambda: from_command_line(Run, [f"config={file}" for file in files], ""))
    assert message.startswith("config: it is given 2 times")


def test_the_resolved_settings_show_no_credentials(capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://user:hunter2@host/a?sig=s3cr3t"
    with pytest.raises(SystemExit):
        from_command_line(Run, [f"note={address}", f"names=['{address}']", "--print-config"], "")
    shown = capsys.readouterr().out
    assert "https://***@host/a?sig=***" in shown
    assert "hunter2" not in shown
    assert "s3cr3t" not in shown


def test_a_wrong_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("stepz: 3\nrate: 2\n")
    assert one_line(lambda: from_command_line(Run, [f"config={path}", "rate=3"], "")).startswith(f"{path}: stepz: ")
    assert one_line(lambda: from_command_line(Run, [f"config={path}", "stepz=3"], "")).startswith("stepz: ")


@given(st.text(max_size=12), st.text(alphabet="ab.[]{}${}=:,-*&!|>%@'\"#?/ \n\t01e", max_size=12))
def test_any_setting_is_read_or_refused_in_one_line(key: str, text: str) -> None:
    message = "read"
    try:
        found = values(f"{key}={text}", below={"a": [{"b": 1}]})
        to_yaml(found)
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
