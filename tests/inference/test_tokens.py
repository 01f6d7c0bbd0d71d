"""Generation by a token LM: step by step what its whole forward pass says, and bytes out of it."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.commands.generate import generate
from bytelatent.commands.options import GenerateSettings
from bytelatent.errors import UserError
from bytelatent.inference import Sampling
from bytelatent.inference.sampling import SamplingSlots
from bytelatent.inference.step import engine_for
from bytelatent.model import TokenLMSettings, pack_rows
from bytelatent.text.tokenizer import TOKENIZER, Tokenizer, train_tokenizer
from bytelatent.vocab import BOS, EOS, OFFSET
from bytelatent.weights import Config, StoredModel, write_model
from tests.model.tiny import make

BPE = Tokenizer(train_tokenizer([b"the cat sat on the mat, and the cat went over the mat. "] * 9, 290))
SETTINGS = TokenLMSettings(dim=16, num_layers=2, num_heads=2, multiple_of=8, vocab_size=304)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> Any:
    model = make(SETTINGS)
    model.output.weight.data.mul_(6)  # so that what is drawn differs
    return model


def engine(model: Any, batch_size: int = 2) -> Any:
    return engine_for(model, None, None, batch_size, vocabulary=BPE)


@torch.no_grad()
def test_greedy_is_that_of_whole_passes(model: Any) -> None:
    """Also with a penalty of what occurred; special ids and those that the tokenizer lacks are never drawn."""
    for prompt, penalty in (("the cat", 1.0), ("", 1.0), ("over the größere", 1.7)):
        own = engine(model)
        [found] = own.submit(prompt, Sampling(temperature=0, repetition_penalty=penalty), 60)
        own.run()
        ids = BPE.encode(prompt, eos=False).tolist()
        for drawn, log_probability in zip(found.ids, found.log_probabilities, strict=True):
            logits = model(pack_rows([torch.tensor(ids)]))[-1].double()
            assert log_probability == pytest.approx(float(logits.log_softmax(-1)[drawn]), abs=1e-4)
            seen = [i for i in set(ids) if i >= OFFSET]
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            logits[[0, BOS, 3, *range(BPE.size, 304)]] = -torch.inf
            assert drawn == int(logits.argmax())
            ids.append(drawn)
        assert found.data == BPE.decode(found.ids)[:60]
        assert found.ended == ("end of text" if found.ids[-1] == EOS else "length")


def test_sequences_do_not_depend_on_others(model: Any) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=200, min_p=0.001, seed=4)
    alone = []
    for prompt in ("the", "a cat", "on"):
        own = engine(model, 1)
        alone += own.submit(prompt, sampling, 30)
        own.run()
    together = engine(model, 2)
    asked = [together.submit(prompt, sampling, 30)[0] for prompt in ("the", "a cat", "on")]
    together.run()
    assert [one.ids for one in asked] == [one.ids for one in alone]
    assert len({tuple(one.ids) for one in asked}) == 3


def test_shares_of_a_large_vocabulary() -> None:
    """As softmax has them, where the sum of all weights times a random number is beyond 64 bits."""
    vocabulary = Tokenizer(BPE.text)
    vocabulary.id_bytes = vocabulary.id_bytes.repeat(200)
    vocabulary.size, size = len(vocabulary.id_bytes), len(vocabulary.id_bytes)
    slots = SamplingSlots.empty(1, "cpu", vocabulary, size)
    slots.put(0, Sampling(temperature=1.0), torch.tensor([BOS]), 10**6)
    logits = torch.zeros(1, size)
    drawn = []
    for _ in range(200):
        ids, _ = slots.draw(logits)
        slots.read(ids, torch.tensor([True]))
        drawn.append(int(ids))
    quarters = torch.bincount(torch.tensor(drawn) * 4 // size, minlength=4)
    assert quarters.min() > 25  # of 50 expected; all ids are equally likely


def test_stop_texts_and_limits_are_of_bytes(model: Any) -> None:
    own = engine(model)
    [whole] = own.submit("the", GREEDY, 40)
    own.run()
    data = whole.data
    stop = data[11:13]
    [stopped], [cut] = own.submit("the", Sampling(temperature=0, stop=[stop]), 40), own.submit("the", GREEDY, 7)
    own.run()
    assert stopped.data == data[: data.index(stop)]
    assert (stopped.ended, cut.ended, cut.data) == ("stop", "length", data[:7])
    with pytest.raises(UserError, match="valid_utf8: a token LM draws tokens"):
        own.submit("the", Sampling(valid_utf8=True), 7)


def test_command(model: Any, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER).write_text(BPE.text)
    stored = StoredModel.of(model, Config(model=SETTINGS, context=40))
    write_model(replace(stored, tokenizer=tmp_path / TOKENIZER), tmp_path / "m", "native")
    own = engine(model)
    [expected] = own.submit("the größere", GREEDY, 20)
    own.run()
    given: dict[str, Any] = {"model": str(tmp_path / "m"), "max_new_bytes": 20, "sampling": GREEDY, "device": "cpu"}
    out = io.BytesIO()
    generate(GenerateSettings(prompt="the größere", **given), out)
    assert out.getvalue().decode() == f"the größere{expected.text}\n"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "the größere"}) + "\n")
    out = io.BytesIO()
    generate(GenerateSettings(jsonl=str(rows), **given), out)
    assert json.loads(out.getvalue())["text"] == expected.text
