"""`generate`: our engine's texts, transformers' arguments, and its own loop on our KV caches with the same result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BltForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.hf import BytelatentForCausalLM, BytelatentTokenizer
from bytelatent.inference import Sampling
from bytelatent.vocab import encode

TEXTS = ["The history of", "a", "été \u6f22", "one two three four five"]
NEW = 24
tokenizer = BytelatentTokenizer()


@pytest.fixture(scope="module")
def model(folder: Path) -> BytelatentForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(blt: BLT) -> list[list[int]]:
    """The ids that our own engine gives, EOS included."""
    with_ids = []
    for text in TEXTS:
        engine = blt.engine(1)
        [found] = engine.submit(text, Sampling(temperature=0), NEW)
        engine.run()
        with_ids.append(found.ids)
    return with_ids


def prompts(side: str = "left", texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return dict(tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))


def unchanged(_: Tensor, scores: Tensor) -> Tensor:
    return scores


ON_HOST = {"logits_processor": LogitsProcessorList([unchanged])}


def new(sequences: Tensor, given: dict[str, Tensor]) -> list[list[int]]:
    """The ids after each prompt, without padding after their end."""
    rows = []
    for row in sequences[:, given["input_ids"].shape[1] :].tolist():
        rows.append(row[: row.index(0)] if 0 in row else row)
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", [{}, ON_HOST], ids=["engine", "host"])
def test_greedy(model: BytelatentForCausalLM, expected: list[list[int]], how: dict[str, Any], side: str) -> None:
    """Byte for byte our own text, for any row in any batch and with any padding."""
    given = prompts(side)
    found = model.generate(**given, max_new_tokens=NEW, **how)
    assert torch.equal(found[:, : given["input_ids"].shape[1]], given["input_ids"])
    assert new(found, given) == expected
    for text, ids in zip(TEXTS, expected, strict=True):
        alone = prompts(side, [text])
        assert new(model.generate(**alone, max_new_tokens=NEW, **how), alone) == [ids]


def test_as_the_own_class(model: BytelatentForCausalLM, blt: BLT) -> None:
    given = prompts()
    found = model.generate(**given, max_new_tokens=NEW)
    texts = blt.generate(TEXTS, max_new_bytes=NEW, temperature=0)
    assert tokenizer.batch_decode(found[:, given["input_ids"].shape[1] :], skip_special_tokens=True) == texts


def test_as_transformers(model: BytelatentForCausalLM, blt: BLT, expected: list[list[int]], tmp_path: Path) -> None:
    """Its class has no cache that works, and takes padding for text, so row by row; its windows are not reached."""
    blt.save_pretrained(tmp_path / "theirs", format="hf")
    theirs = BltForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    for text, ids in zip(TEXTS[:3], expected[:3], strict=True):
        given = prompts(texts=[text])
        num_new = min(len(ids), 29 - given["input_ids"].shape[1])
        sequence = theirs.generate(**given, max_new_tokens=num_new, use_cache=False, suppress_tokens=[0, 1, 3])
        assert sequence[0, given["input_ids"].shape[1] :].tolist() == ids[:num_new]


def test_without_a_mask(model: BytelatentForCausalLM, expected: list[list[int]]) -> None:
    for side in ("left", "right"):
        given = prompts(side)
        assert new(model.generate(given["input_ids"], max_new_tokens=NEW), given) == expected
    begun = model.generate(max_new_tokens=3)
    assert torch.equal(begun, model.generate(torch.tensor([[1]]), max_new_tokens=3))


def test_lengths(model: BytelatentForCausalLM) -> None:
    given = {"input_ids": torch.from_numpy(encode("abc", eos=False))[None]}
    assert model.generate(**given, eos_token_id=None).shape == (1, 4 + 20)
    for how in ({}, ON_HOST):
        assert model.generate(**given, max_length=20, **how).shape[1] <= 20
        assert model.generate(**given, max_length=7, **how).shape[1] <= 7
        assert model.generate(**given, max_new_tokens=2, max_length=30, **how).shape[1] <= 6
    with pytest.raises(UserError, match="max_length: 4 leaves no room"):
        model.generate(**given, max_length=4)


@pytest.mark.parametrize("how", [{}, ON_HOST], ids=["engine", "host"])
def test_ends(model: BytelatentForCausalLM, expected: list[list[int]], how: dict[str, Any]) -> None:
    """Ids that end a text stand at its end; after it there is padding."""
    given = prompts()
    end = expected[0][5]
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in expected]
    for ends in (end, [2, end], torch.tensor([2, end])):
        ends = [2, ends] if ends is end else ends
        found = model.generate(**given, max_new_tokens=NEW, eos_token_id=ends, **how)
        assert new(found, given) == cut
    found = model.generate(**given, max_new_tokens=NEW, eos_token_id=[2, end], pad_token_id=200, **how)
    for row, ids in zip(found[:, given["input_ids"].shape[1] :].tolist(), cut, strict=True):
        assert row == ids + [200] * (len(row) - len(ids))
    no_end = model.generate(**given, max_new_tokens=NEW, eos_token_id=None, **how)
    assert no_end.shape[1] == given["input_ids"].shape[1] + NEW


def test_sampling(model: BytelatentForCausalLM) -> None:
    """A seed of torch repeats it, rows differ, and `top_k=1` is greedy."""
    given = prompts()
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model.generate(**given, **settings, temperature=1.3, top_p=0.95, min_p=0.01))
    assert found[0].shape[0] == 3 * len(TEXTS)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    same = prompts(texts=["same", "same"])
    rows = new(model.generate(**same, **settings), same)
    assert len({tuple(row) for row in rows}) == 6
    greedy = model.generate(**given, max_new_tokens=NEW)
    assert torch.equal(model.generate(**given, **{**settings, "num_return_sequences": 1}, top_k=1), greedy)
    assert torch.equal(model.generate(**given, **{**settings, "num_return_sequences": 1}, temperature=1e-6), greedy)


def test_shares(model: BytelatentForCausalLM) -> None:
    """Of many draws of one byte, each way draws every byte as often as the model says."""
    given = prompts(texts=["x"])
    logits = model(**given).logits[0, -1].double()
    logits[[0, 1, 3]] = -torch.inf
    logits[logits < logits.topk(4).values[-1]] = -torch.inf
    shares = (logits / 0.7).softmax(-1)
    torch.manual_seed(0)
    for how in ({}, ON_HOST):
        settings = {"do_sample": True, "temperature": 0.7, "top_k": 4, "max_new_tokens": 1}
        drawn = model.generate(**given, num_return_sequences=2000, **settings, **how)[:, -1]
        counts = torch.bincount(drawn, minlength=260) / 2000
        assert (counts - shares).abs().max() < 0.05
        assert (counts[shares == 0] == 0).all()


def test_processors_and_criteria(model: BytelatentForCausalLM, expected: list[list[int]]) -> None:
    """Called once per step with the ids so far; what they say counts."""
    given, seen = prompts(), []
    start = given["input_ids"].shape[1]

    def only_letters(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids.shape)
        return scores.masked_fill((torch.arange(260) < 101) | (torch.arange(260) > 126), -torch.inf)

    def at_ten(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= start + 10)

    found = model.generate(
        **given,
        max_new_tokens=NEW,
        logits_processor=LogitsProcessorList([only_letters]),
        stopping_criteria=StoppingCriteriaList([at_ten]),
    )
    assert found.shape[1] == start + 10
    assert all(101 <= id_ <= 126 for row in found[:, start:].tolist() for id_ in row)
    assert seen == [(len(TEXTS), start + step) for step in range(10)]
    stopped = model.generate(**given, max_new_tokens=NEW, stopping_criteria=[at_ten])
    assert new(stopped, given) == [ids[:10] for ids in expected]


def test_scores(model: BytelatentForCausalLM) -> None:
    """The logits of each step are those of the forward pass on the whole text."""
    given = prompts()
    start = given["input_ids"].shape[1]
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found = model.generate(**given, max_new_tokens=8, eos_token_id=None, **asked)
    assert len(found.scores) == len(found.logits) == 8
    mask = torch.cat([given["attention_mask"], torch.ones(len(TEXTS), 8, dtype=torch.long)], 1)
    whole = model(found.sequences, attention_mask=mask).logits[:, start - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.stack(found.scores, 1).argmax(-1), found.sequences[:, start:])
    assert (torch.stack(found.scores, 1)[..., [0, 1, 3]] == -torch.inf).all()
    alone = model.generate(**given, max_new_tokens=8, return_dict_in_generate=True)
    assert torch.equal(alone.sequences, model.generate(**given, max_new_tokens=8))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 3.0},
        {"repetition_penalty": 1.5, "do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 1e-4},
        {"do_sample": True, "min_p": 1.0},
    ],
)
def test_both_ways_agree(model: BytelatentForCausalLM, settings: dict[str, Any]) -> None:
    given = prompts()
    found = model.generate(**given, max_new_tokens=NEW, **settings)
    assert torch.equal(found, model.generate(**given, max_new_tokens=NEW, **settings, **ON_HOST))


def test_what_only_their_loop_has(model: BytelatentForCausalLM, expected: list[list[int]]) -> None:
    given = prompts()
    start = given["input_ids"].shape[1]
    first = expected[0][0]
    assert model.generate(**given, max_new_tokens=4, bad_words_ids=[[first]])[0, start] != first
    assert model.generate(**given, max_new_tokens=4, suppress_tokens=[first])[0, start] != first
    end = expected[0][3]
    longer = model.generate(**given, max_new_tokens=9, min_new_tokens=9, eos_token_id=[2, end])
    assert end not in longer[0, start:].tolist()
    stop = next(chr(id_ - 4) for id_ in expected[3] if 36 <= id_ < 131)
    one = prompts(texts=TEXTS[3:])
    found = model.generate(**one, max_new_tokens=NEW, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(found[0]).endswith(stop)
    assert found.shape[1] < one["input_ids"].shape[1] + NEW
    only = model.generate(**given, max_new_tokens=4, prefix_allowed_tokens_fn=lambda _, __: [104, 105])
    assert set(only[:, start:].flatten().tolist()) <= {104, 105}


class Recorder:
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.has_ended = True


@pytest.mark.parametrize("how", [{}, ON_HOST], ids=["engine", "host"])
def test_streamers(model: BytelatentForCausalLM, how: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for given in (prompts(texts=TEXTS[:1]), prompts()):
        streamer = Recorder()
        found = model.generate(**given, max_new_tokens=NEW, streamer=streamer, **how)
        assert streamer.has_ended
        columns = [piece.flatten()[:, None] for piece in streamer.pieces[1:]]
        assert torch.equal(torch.cat([streamer.pieces[0].view(len(found), -1), *columns], 1), found)
    given = prompts(texts=TEXTS[:1])
    text = tokenizer.decode(found[0, given["input_ids"].shape[1] :])
    found = model.generate(**given, max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=True), **how)
    text = tokenizer.decode(found[0, given["input_ids"].shape[1] :])
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**given, max_new_tokens=NEW, streamer=pieces, **how)
    assert "".join(pieces) == text


def test_configurations(model: BytelatentForCausalLM, folder: Path, tmp_path: Path) -> None:
    """Of a call, of the model, and saved with it."""
    given = prompts()
    short = model.generate(**given, max_new_tokens=5)
    assert torch.equal(model.generate(**given, generation_config=GenerationConfig(max_new_tokens=5)), short)
    other = AutoModelForCausalLM.from_pretrained(folder)
    other.generation_config.max_new_tokens = 5
    assert torch.equal(other.generate(**given), short)
    other.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**given), short)
    assert torch.equal(again.generate(**given, max_new_tokens=3), short[:, :-2])
    assert model.can_generate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 4}, "num_beams: 4; beam search"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams: 2"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, "inputs_embeds"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask"),
        ({"attention_mask": torch.zeros(1, 4)}, "attention_mask is 0.0 everywhere"),
        ({"attention_mask": torch.zeros(1, 4, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.tensor([[1, 300]])}, "259"),
        ({"input_ids": torch.tensor([1, 30])}, r"\[B, N\]"),
        ({"typo": 3}, "typo"),
    ],
)
def test_refused(model: BytelatentForCausalLM, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.generate(**{"input_ids": torch.tensor([[1, 101, 102, 103]]), **arguments})
