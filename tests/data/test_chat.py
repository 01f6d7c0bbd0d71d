"""Conversations as training data: which bytes count, and what a batch of them is."""

import io
import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bytelatent.data import Batch, DataSettings, Loader, Patcher, Piece, batches_once, fill_batch, pack, split_document
from bytelatent.errors import UserError
from bytelatent.model import BLTModel
from bytelatent.model.loss import bits_per_byte, cross_entropy
from bytelatent.model.settings import NgramHashSettings
from bytelatent.patching import PatchSettings
from bytelatent.text import BadRows, Document, ReadOptions, open_blocks
from bytelatent.text.chat import DEFAULT_TEMPLATE, ChatTemplate
from bytelatent.text.conversations import ChatOptions, conversation_of
from bytelatent.training.checkpoint.manager import arrays_to_tensors, tensors_to_arrays
from bytelatent.vocab import EOS, decode
from tests.model.tiny import tiny_blt

OPTIONS = ChatOptions(DEFAULT_TEMPLATE)
PATCHER = Patcher(PatchSettings(mode="space"))


def talk(number: int, exchanges: int = 1, system: bool = False) -> list[dict[str, Any]]:
    said = [
        {"role": role, "content": f"{'ask' if role == 'user' else 'answer'} {number}.{i}"}
        for i in range(exchanges)
        for role in ("user", "assistant")
    ]
    return [{"role": "system", "content": f"system {number}"}] * system + said


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(path: Path, **more: Any) -> DataSettings:
    train = [{"path": str(path), "format": "chat", **more.pop("source", {})}]
    return DataSettings.parse({"train": train, "context": 200, "batch_bytes": 400, "shuffle_buffer": 4, **more})


def counted(batch: Batch) -> bytes:
    return decode([target for target in batch.targets.tolist() if target >= 0])


def documents_of(path: Path, **more: Any) -> Iterator[Document | Exception]:
    reader = open_blocks(str(path), ReadOptions(stored=False, chat=OPTIONS, **more))
    block = reader.read(0)
    assert block is not None
    yield from (found for _, found in block.rows())


ROWS: list[Any] = [
    {"messages": talk(0), "id": "a"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "ask é"}]}, talk(1)[1]]},
    {"prompt": talk(2)[:1], "completion": talk(2)[1:]},
    {"prompt": talk(3, 2)[:3], "completion": talk(3, 2)[3:]},  # an answer that is given does not count
    {"prompt": "1+1=", "completion": "2"},
]
COUNTED = [b"answer 0.0\x03", b"answer 1.0\x03", b"answer 2.0\x03", b"answer 3.1\x03", b"2"]


def test_every_format(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    rows = [dict.fromkeys(("prompt", "completion", "messages")) | row for row in (ROWS[0], *ROWS[2:4])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    of_jsonl = list(documents_of(tmp_path / "a.jsonl"))
    assert list(documents_of(tmp_path / "b.json")) == of_jsonl
    of_parquet = list(documents_of(tmp_path / "c.parquet"))
    assert [d.text for d in of_parquet] == [of_jsonl[i].text for i in (0, 2, 3)]  # pyright: ignore[reportAttributeAccessIssue]
    for document, expected in zip(of_jsonl, COUNTED, strict=True):
        assert isinstance(document, Document)
        [piece] = split_document(document, 1000)
        assert piece.counts is not None
        ids = piece.ids[1:][piece.counts]
        assert decode(ids) == expected
        assert (ids == EOS).sum() == (expected == b"2")  # nothing else ends it
    assert of_jsonl[0].id == "a"  # pyright: ignore[reportAttributeAccessIssue]
    all_of_it = conversation_of(ROWS[0], "text", ChatOptions(DEFAULT_TEMPLATE, "all"))
    assert all_of_it is not None
    assert [counts.all() for _, counts in all_of_it.within(1000)] == [True]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("[1]", "is not a JSON object"),
        ('{"text": "x"}', r"has no 'messages', nor 'prompt' and 'completion'; its keys: text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "holds no answer of the assistant"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot' is not one of"),
        ('{"messages": [{"role": "assistant"}]}', r"messages\[0\] \(assistant\) has no content"),
        ('{"messages": "hello"}', "list of messages"),
        ('{"prompt": "x", "completion": []}', "both be texts"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "half a surrogate pair"),
    ],
)
def test_bad_rows(tmp_path: Path, row: str, expected: str) -> None:
    """They are counted and named as all bad rows are."""
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{row}\n{json.dumps(ROWS[2])}\n")
    found = BadRows(1)
    batches = list(batches_once(settings_of(path).train, 200, 400, bad_rows=found))
    assert [counted(batch) for batch in batches] == [COUNTED[0] + COUNTED[2]]
    assert found.count == 1
    with pytest.raises(UserError, match=rf"line 2 .*{expected}"):
        list(batches_once(settings_of(path).train, 200, 400))
    with pytest.raises(UserError, match="line 2"):
        next(Loader(settings_of(path, max_bad_rows=0), 0))


def test_where_no_conversations_are(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.txt").write_text("text")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    for name, expected in (("a.txt", "is plain text"), ("a.parquet", "no column 'messages' or 'prompt' or")):
        with pytest.raises(UserError, match=expected):
            list(batches_once(settings_of(tmp_path / name).train, 200, 400))
    write_rows(tmp_path / "a.jsonl", ROWS)
    plain = DataSettings.parse({"train": str(tmp_path / "a.jsonl")}).train
    with pytest.raises(UserError, match="set format: chat"):
        list(batches_once(plain, 200, 400))
    with pytest.raises(UserError, match="train_on is for conversations"):
        DataSettings.parse({"train": {"path": "x", "train_on": "all"}})


def test_long_conversations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are cut between exchanges, each part as the model reads it when older turns were dropped."""
    messages = talk(7, exchanges=9, system=True)
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": talk(1, 2, system=True)}])
    [document, _] = documents_of(path)
    assert isinstance(document, Document)
    pieces = list(split_document(document, 130))
    assert len(pieces) > 2
    at = 1
    for piece in pieces:
        assert len(piece) <= 130
        own = (len(piece.ids) - len(DEFAULT_TEMPLATE.ids(messages[:1], False)) - 1) // 31  # bytes of an exchange
        said = [messages[0], *messages[at : at + 2 * own]]
        assert piece.ids.tolist() == [*DEFAULT_TEMPLATE.ids(said, False).tolist(), EOS]
        at += 2 * own
    assert at == len(messages)
    trained = b"".join(decode(p.ids[1:][p.counts]) for p in pieces if p.counts is not None)
    assert trained == "".join(m["content"] + "\x03" for m in messages if m["role"] == "assistant").encode()
    short = list(split_document(document, 40))  # less than one exchange with the system message
    assert b"".join(decode(p.ids[1:][p.counts]) for p in short if p.counts is not None) == trained
    with Loader(settings_of(path, context=130), 0) as loader:
        next(loader)
    assert caplog.text.count("holds conversations longer than data.context=130") == 1


def test_batches_hold_whole_conversations(tmp_path: Path) -> None:
    """While any fits in a batch. Nothing is lost, whatever the sizes."""
    rows = [{"messages": talk(i, 1 + i % 4)} for i in range(23)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    batches = list(batches_once(settings_of(path).train, 200, 250, PATCHER, slots=80, padded=True))
    answers = b"".join(m["content"].encode() + b"\x03" for row in rows for m in row["messages"][1::2])
    found = sorted(b"".join(map(counted, batches)).split(b"\x03"))
    assert found == sorted(answers.split(b"\x03"))
    for batch in batches:
        begins = batch.stream.ids[batch.stream.position == 0][: len(set(batch.stream.document.tolist()) - {-1})]
        assert (begins == 1).all()  # BOS
        assert batch.num_targets == int((batch.targets >= 0).sum())
        assert batch.target_bytes == int((batch.targets >= 4).sum())
        assert batch.num_ids == int((batch.stream.document >= 0).sum())
        assert batch.num_bytes > batch.target_bytes
    [long] = split_document(next(iter(documents_of(path))), 1000)  # pyright: ignore[reportArgumentType]
    ready = deque([long])
    parts = []
    while taken := fill_batch(ready, 20, None, lambda: False):
        parts += taken
    assert [len(part) for part in parts] == [20] * (len(long) // 20) + [len(long) % 20] * (len(long) % 20 > 0)
    assert np.concatenate([part.counts for part in parts]).tolist() == long.counts.tolist()  # pyright: ignore


@pytest.mark.parametrize("done", [0, 3, 11])
def test_goes_on_bit_for_bit(tmp_path: Path, done: int) -> None:
    chats = write_rows(tmp_path / "a.jsonl", [{"messages": talk(i, 1 + i % 9)} for i in range(30)])
    texts = write_rows(tmp_path / "b.jsonl", [{"text": "some text " * (i % 5 + 1)} for i in range(30)])
    data = settings_of(chats, context=150)
    data = data.model_copy(update={"train": [*data.train, *DataSettings.parse({"train": str(texts)}).train]})
    data = data.model_copy(update={"batch_patches": 60, "workers": int(done == 3)})
    with Loader(data, 1, PATCHER) as loader:
        for _ in range(done):
            next(loader)
        stored = io.BytesIO()
        torch.save(arrays_to_tensors(loader.state_dict()), stored)
        following = [next(loader) for _ in range(8)]
    stored.seek(0)
    again = Loader(data.model_copy(update={"workers": 0}), 1, PATCHER)
    again.load_state_dict(tensors_to_arrays(torch.load(stored, weights_only=True)))
    for batch in following:
        other = next(again)
        assert other.targets.equal(batch.targets)
        assert all(t.equal(other.stream.tensors[name]) for name, t in batch.stream.tensors.items())
        assert (other.num_targets, other.target_bytes) == (batch.num_targets, batch.target_bytes)
    assert any((batch.targets[batch.stream.document >= 0] < 0).any() for batch in following)


def test_the_loss_is_that_of_each_conversation_alone(tmp_path: Path) -> None:
    """Packing with others changes nothing, and what counts is what the assistant says; float64, logits float32."""
    hashes = NgramHashSettings(sizes=[3, 4], vocab_size=101, stop_at_document=False)
    model: BLTModel = tiny_blt(seed=1, ngram_hash=hashes).double()
    rows = [{"messages": talk(i, 1 + i % 3, system=bool(i % 2))} for i in range(5)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with Loader(settings_of(path, batch_bytes=700, context=400), 0, PATCHER) as loader:
        batch = next(loader)
    with torch.no_grad():
        packed = float(cross_entropy(model, batch))
    nats, num_counted, num_bytes = 0.0, 0, 0
    starts = (batch.stream.position == 0).nonzero()[:, 0].tolist()
    read = [batch.stream.ids[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    read = [ids for ids in read if ids[0] == 1]  # without padding
    for ids in read:
        text = decode(ids.tolist())
        messages = next(row["messages"] for row in rows if DEFAULT_TEMPLATE.render(row["messages"], False) == text)
        [piece] = PATCHER([Piece(np.array([*ids.tolist(), EOS], np.uint16))])
        with torch.no_grad():
            log_probabilities = model(pack([piece]).stream).log_softmax(-1)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                begin = len(DEFAULT_TEMPLATE.ids(messages[:number]))
                for at, byte in enumerate(f"{message['content']}\x03".encode(), start=begin):
                    nats -= float(log_probabilities[at - 1, byte + 4])
                    num_counted += 1
        num_bytes += len(text)
    assert packed == pytest.approx(nats, rel=2e-7)
    assert (batch.num_targets, batch.target_bytes, batch.num_bytes) == (num_counted, num_counted, num_bytes)
    assert bits_per_byte(packed, batch.target_bytes) == pytest.approx(packed / math.log(2) / num_counted)


def test_templates_are_the_runs(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": talk(1)}])
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}")
    [batch] = batches_once(settings_of(path).train, 200, 400, chat_template=template)
    assert decode(batch.stream.ids.tolist()) == b"<user>ask 1.0<assistant>answer 1.0"
    assert [t for t in batch.targets.tolist() if t >= 0][-1] == EOS
    with Loader(settings_of(path), 0, chat_template=template) as loader:
        assert set(counted(next(loader)).split(b"<assistant>")) == {b"", b"answer 1.0"}


def test_nothing_but_bad_rows(tmp_path: Path) -> None:
    """They are not called empty documents; and a row is asked for the keys of a conversation."""
    path = write_rows(tmp_path / "bad.jsonl", [[1, 2], {"messages": talk(0)[:1]}])
    with pytest.raises(
        UserError, match=r"all its rows were passed over .*the first: .*not a JSON object with 'messages', or"
    ):
        next(Loader(settings_of(path), 0, PATCHER))
