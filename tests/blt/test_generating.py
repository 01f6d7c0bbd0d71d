"""Settings for each prompt, several streams at once, log-probabilities, random seeds, and names of transformers."""

from typing import Any

import pytest
import torch

from bytelatent import BLT
from bytelatent.blt import generating
from bytelatent.errors import UserError
from tests.model.tiny import tiny_blt
from tests.test_blt import wrap

PROMPTS = ["The", "", "a longer prompt"]


@pytest.fixture(scope="module")
def blt() -> BLT:
    return wrap(tiny_blt(window=6))


def test_settings_for_each_prompt(blt: BLT) -> None:
    several: dict[str, Any] = {"temperature": [0, 1.0, 0.5], "seed": [1, 2, 3], "max_new_bytes": [4, 9, 6], "top_k": 40}
    stop = [["\x00"], ["e", "a"], "o"]
    found = blt.generate(PROMPTS, stop=stop, **several)
    for number, prompt in enumerate(PROMPTS):
        own = {key: value[number] if isinstance(value, list) else value for key, value in several.items()}
        assert found[number] == blt.generate(prompt, stop=stop[number], **own)
    assert blt.generate(PROMPTS, samples=2, **several)[1][0] == blt.generate(
        PROMPTS[1], temperature=1.0, seed=2, max_new_bytes=9, top_k=40
    )
    assert blt.generate(PROMPTS, 5, stop=["x", "y"]) == [blt.generate(text, 5, stop=["x", "y"]) for text in PROMPTS]


def test_streams_of_several_prompts(blt: BLT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "MAX_BATCH_SIZE", 2)
    settings: dict[str, Any] = {"max_new_bytes": [12, 3, 20], "temperature": [1.0, 0.3, 0.9]}
    texts = ["", "", ""]
    order = []
    for index, new in blt.stream(PROMPTS, **settings):
        assert new
        texts[index] += new
        order.append(index)
    assert texts == blt.generate(PROMPTS, **settings)
    assert order != sorted(order)  # they come at the same time
    for _ in zip(blt.stream(PROMPTS, 50), range(2), strict=False):  # nobody wants the rest
        pass
    assert list(blt.stream([], 5)) == []


def test_log_probabilities(blt: BLT) -> None:
    found = blt.generate(PROMPTS, 8, temperature=0.7, return_log_probabilities=True)
    assert [each.text for each in found] == blt.generate(PROMPTS, 8, temperature=0.7)
    for prompt, each in zip(PROMPTS, found, strict=True):
        ids = torch.cat([blt.encode(prompt)[0], each.ids])
        log_p = blt.logits(ids[None])[0].log_softmax(-1)
        expected = log_p[len(ids) - len(each.ids) - 1 : -1].gather(1, each.ids[:, None])[:, 0]
        torch.testing.assert_close(each.log_probabilities, expected, atol=1e-4, rtol=0)
        assert each.ended in ("length", "end of text")
    two = blt.generate("a", 4, samples=2, return_log_probabilities=True)
    assert [each.text for each in two] == blt.generate("a", 4, samples=2)


def test_a_random_seed(blt: BLT, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([7, 7, 8, 9])
    monkeypatch.setattr(generating.secrets, "randbits", lambda bits: next(drawn))
    assert blt.generate("The", 12, seed=None) == blt.generate("The", 12, seed=7)
    assert blt.generate(["The", "The"], 12, seed=[None, 3]) == blt.generate(["The", "The"], 12, seed=[7, 3])
    assert blt.generate(["The", "The"], 12, seed=None) == blt.generate(["The", "The"], 12, seed=[8, 9])
    monkeypatch.undo()
    assert len({blt.generate("The", 12, temperature=1.0, seed=None) for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 5}, "^generate: max_new_tokens is a name of transformers; write max_new_bytes="),
        ({"do_sample": False}, "^generate: do_sample is a name of transformers; leave it out; temperature=0 takes"),
        ({"num_return_sequences": 2}, "^generate: num_return_sequences is a name of transformers; write samples=$"),
        ({"temperature": [0.1, 0.2]}, "^temperature: a list of 2 for 3 prompts; give one value, or one for each"),
        ({"max_new_bytes": [1, 2, 3, 4]}, "^max_new_bytes: a list of 4 for 3 prompts"),
        ({"max_new_bytes": [1, 2, 0]}, "^max_new_bytes: 0 is not a number"),
        ({"temperature": [0.1, 0.2, -1]}, "temperature: Input should be greater than or equal to 0"),
        ({"stop": [["a"], ["b"]]}, "^stop: a list of 2 for 3 prompts"),
        ({"topp": [1, 1, 1]}, "topp: unknown key; did you mean 'top_p'"),
    ],
)
def test_wrong_settings_are_named(blt: BLT, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        blt.generate(PROMPTS, **settings)
    with pytest.raises(UserError, match=message.replace("generate:", "stream:")):
        blt.stream(PROMPTS, **settings)


def test_a_list_of_settings_for_one_prompt(blt: BLT) -> None:
    with pytest.raises(UserError, match="seed: a list of 2 for 1 prompt; give one value"):
        blt.generate("a", seed=[1, 2])


def test_inside_and_outside_inference_mode() -> None:
    """In any order, and with weights that were made there."""
    blt = wrap(tiny_blt(window=6))
    expected, expected_too = blt.generate("a", 5), blt.generate("b", 5)
    blt._idle_engine = None
    with torch.inference_mode():
        assert blt.generate("a", 5) == expected
        pieces = blt.stream("a", 5)
        first = next(pieces)
        made_inside = wrap(tiny_blt(window=6))
        assert made_inside.generate("a", 5) == expected
    assert first + "".join(pieces) == expected
    assert blt.generate("b", 5) == expected_too
    with torch.inference_mode():
        assert blt.generate("a", 5) == expected
    assert made_inside.generate("b", 5) == expected_too
    with torch.inference_mode():
        made_inside.model.decoder.output.weight.copy_(made_inside.model.decoder.output.weight.flip(0))
    assert blt.generate("b", 5, temperature=0) != made_inside.generate("b", 5, temperature=0)


def test_samples_of_a_stream(blt: BLT) -> None:
    with pytest.raises(UserError, match=r"^samples: stream gives one .* use generate"):
        blt.stream("a", 5, samples=2)
