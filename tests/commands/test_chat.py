"""A conversation in the terminal, and through pipes, with a model whose every answer is known."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent import signals
from bytelatent.commands import chat as verb
from bytelatent.commands.chat import Chat, message_from, obeyed, open_chat
from bytelatent.commands.chat_options import ChatSettings
from bytelatent.errors import Interrupted, UserError
from bytelatent.text.chat import CHAT_TEMPLATE, DEFAULT_TEMPLATE
from bytelatent.vocab import OFFSET
from tests.model.tiny import tiny_blt
from tests.test_blt import wrap


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    blt = wrap(tiny_blt(window=6))
    blt.chat_template = DEFAULT_TEMPLATE
    blt.save_pretrained(folder)
    return folder


def settings_of(model: Path, **more: Any) -> ChatSettings:
    return ChatSettings.parse(
        {"model": str(model), "max_new_bytes": 12, "context": 1000, "sampling": {"temperature": 0.0}, **more}
    )


@pytest.fixture
def chat(model: Path) -> Chat:
    return open_chat(settings_of(model, system="Be brief."))


def through(monkeypatch: pytest.MonkeyPatch, text: str, settings: ChatSettings) -> str:
    """What the command prints for this standard input."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", out)
    try:
        verb.run(settings)
    finally:
        monkeypatch.undo()
    return out.getvalue()


def test_an_answer_is_the_continuation_of_the_prompt(chat: Chat) -> None:
    """With all that was said before; and it ends at the template's stop text."""
    for said in ("Hello", "And then?"):
        pieces = list(chat.answer(said))
        prompt = chat.template.ids(chat.messages[:-1])
        [expected] = chat.engine.submit(torch.from_numpy(prompt), chat.sampling, 12)
        chat.engine.run()
        assert "".join(pieces) == chat.messages[-1]["content"] == expected.text
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 2]
    assert chat.messages[0]["content"] == chat.system == "Be brief."
    assert chat.sampling.stop == ["\x03"]
    likely = chat.messages[-1]["content"].encode()[:1]
    chat.sampling = chat.sampling.model_copy(update={"stop": [likely]})
    chat.messages = chat.messages[:3]
    assert "".join(chat.answer("And then?")) == ""
    assert chat.ended == "stop"


def test_an_answer_reads_only_what_is_new(model: Path) -> None:
    """And answers as one that reads the whole conversation again."""
    settings = settings_of(model, context=4000)
    chat, again = open_chat(settings), open_chat(settings)
    for said in ("a long question, " * 30, "And then?", "And last?"):
        read_before = chat.engine.prompts.num_read
        answer = "".join(chat.answer(said))
        num_read = chat.engine.prompts.num_read - read_before
        again.engine.serve(64)  # with no states of earlier prompts
        again.messages = chat.messages[:-2]
        assert "".join(again.answer(said)) == answer
    whole = again.engine.prompts.num_read
    assert num_read < 100 < 500 < whole


def test_the_oldest_messages_are_dropped(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    chat.limit = 80
    prompts = []
    submit = chat.engine.submit
    chat.engine.submit = lambda ids, *how, **more: prompts.append(ids) or submit(ids, *how, **more)  # type: ignore[method-assign]
    for number in range(4):
        list(chat.answer(f"question {number}"))
    text = bytes((prompts[-1][1:] - OFFSET).tolist())
    assert len(prompts[-1]) <= 80 - 12
    assert text.startswith(b"\x01system\x02Be brief.\x03\x01user\x02question ")
    assert b"question 0" not in text
    assert text.endswith(b"question 3\x03\x01assistant\x02")
    assert "messages are not read any more" in caplog.text
    assert len(chat.messages) == 9  # all of it is there to be saved
    caplog.clear()
    list(chat.answer("long " * 30))
    assert "this message alone" in caplog.text


def test_ctrl_c_ends_an_answer(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.max_new_bytes = 50
    advance, steps = chat.engine.advance, []

    def press(at: int, times: int) -> None:
        steps.clear()

        def pressed() -> Any:
            steps.append(1)
            if len(steps) == at:
                for _ in range(times):
                    signals.signal.raise_signal(signals.signal.SIGINT)
            return advance()

        monkeypatch.setattr(chat.engine, "advance", pressed)

    press(at=7, times=1)
    said = "".join(chat.answer("Hello"))
    assert (chat.ended, len(steps)) == ("stopped", 7)
    assert chat.messages[-1]["content"].startswith(said)
    assert 0 < len(chat.messages[-1]["content"].encode("utf-8")) < 50
    press(at=3, times=2)
    with pytest.raises(Interrupted):
        list(chat.answer("Hello"))
    press(at=-1, times=0)
    assert list(chat.answer("Hello"))  # the engine is as before


def test_commands(chat: Chat, tmp_path: Path) -> None:
    shown: list[str] = []
    list(chat.answer("Hello"))
    assert obeyed(chat, "/help", shown.append) is None
    assert all(name.split()[0] in shown[-1] for name in verb.COMMANDS)
    file = tmp_path / "said.jsonl"
    assert obeyed(chat, f"/save {file}", shown.append) is None
    obeyed(chat, f"/save {file}", shown.append)
    assert [json.loads(line)["messages"] for line in file.read_text().splitlines()] == [chat.messages] * 2
    for line, expected in (
        ("/save", "name the file"),
        (f"/save {tmp_path}", "cannot be written"),
        ("/x", "no command"),
    ):
        obeyed(chat, line, shown.append)
        assert expected in shown[-1]
    obeyed(chat, "/reset", shown.append)
    assert [message["content"] for message in chat.messages] == ["Be brief."]
    obeyed(chat, "/system Be long.", shown.append)
    assert chat.system == "Be long."
    obeyed(chat, "/system", shown.append)
    assert chat.messages == []
    assert obeyed(chat, "  ", shown.append) is None
    assert obeyed(chat, "//etc", shown.append) == "/etc"
    with pytest.raises(EOFError):
        obeyed(chat, "/exit", shown.append)


@pytest.mark.parametrize(
    ("text", "said"), [('"""one\ntwo', "one\ntwo"), ("one\\", "one"), ("one\\\ntwo\\", "one\ntwo")]
)
def test_the_end_of_the_input_ends_a_message(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Chat, "answer", lambda self, said: iter(asked.append(said) or ()))
    through(monkeypatch, text, settings_of(model))
    assert asked == [said]


def test_a_system_message_is_of_its_row_alone(model: Path) -> None:
    heard: list[Any] = []
    hello = {"role": "user", "content": "Hello"}
    rows = [[{"role": "system", "content": "Lie."}, hello], [hello]]
    text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    for system in (None, "Be brief."):
        heard.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Chat, "answer", lambda self, said: iter(heard.append(self.system) or ()))
            through(patch, text, settings_of(model, system=system, as_json=True))
        assert heard == ["Lie.", system]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["one"], "one"),
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (['"""one', "", '  two"""'], "one\n\n  two"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
    ],
)
def test_messages_of_several_lines(lines: list[str], expected: str) -> None:
    marks: list[str] = []
    left: Iterator[str] = iter(lines)
    assert message_from(lambda mark: marks.append(mark) or next(left)) == expected
    assert marks == [verb.MARK] + [verb.MORE] * (len(lines) - 1)


def test_pipes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines in, answers out; in JSON, rows that continue the conversation, and rows that are one of their own."""
    chat = open_chat(settings_of(model))
    first, second = "".join(chat.answer("Hello")), "".join(chat.answer("And?"))
    assert through(monkeypatch, "Hello\n\nAnd?\n/exit\nmore\n", settings_of(model)) == f"{first}\n{second}\n"
    rows = [{"content": "Hello"}, {"content": "And?"}, {"messages": [{"role": "user", "content": "Hello"}]}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    found = [json.loads(line) for line in through(monkeypatch, text, settings_of(model, as_json=True)).splitlines()]
    assert [row["content"] for row in found] == [first, second, first]
    assert found[0] == {"role": "assistant", "content": first, "ended": "length"}
    with_system = json.dumps(
        {"messages": [{"role": "system", "content": "s"}, *chat.messages[:2], rows[1] | {"role": "user"}]}
    )
    [row] = map(json.loads, through(monkeypatch, with_system, settings_of(model, as_json=True)).splitlines())
    other = open_chat(settings_of(model, system="s"))
    other.messages += chat.messages[:2]
    assert row["content"] == "".join(other.answer("And?"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hello", "line 1 is no JSON"),
        ("[1]", 'no text under "content"'),
        ('{"messages": []}', "it is empty"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "last message is the assistant's"),
    ],
)
def test_bad_rows(model: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        through(monkeypatch, line, settings_of(model, as_json=True))


def test_templates(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model without a template says so and uses the default one; another can be named."""
    wrap(tiny_blt(window=6)).save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        assert open_chat(settings_of(tmp_path / "base")).template == DEFAULT_TEMPLATE
    assert "has no chat template" in caplog.text
    caplog.clear()
    assert open_chat(settings_of(tmp_path / "base", chat_template=str(model))).template == DEFAULT_TEMPLATE
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    own = open_chat(settings_of(model, chat_template=str(tmp_path / "own.jinja")))
    assert own.sampling.stop == ["!"]
    assert caplog.text == ""
    assert (model / CHAT_TEMPLATE).is_file()
    with pytest.raises(UserError, match="--chat-template: 'none' does not exist"):
        open_chat(settings_of(model, chat_template="none"))
