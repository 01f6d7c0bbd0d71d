"""`/v1/completions` with OpenAI's own client, against the same model in this process."""

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from bytelatent import BLT
from bytelatent.inference import Sampling
from bytelatent.patching import PatchSettings
from bytelatent.serving.backend import Backend
from bytelatent.serving.scheduler import Scheduler
from bytelatent.vocab import OFFSET, encode
from tests.serving.conftest import Served

PROMPTS = ["", "Once", "caf\u00e9 \u4f60\u597d", "a longer prompt, of which nothing is special but its length " * 3]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)


def alone(blt: BLT, prompt: str, size: int = 40, **sampling: Any) -> Any:
    """The continuation by the engine, alone."""
    engine = blt.engine(1)
    [found] = engine.submit(prompt, Sampling(**{"temperature": 1.0, **sampling}), size)
    engine.run()
    return found


def extra(value: Any) -> dict[str, Any]:
    """What the client's types do not know."""
    return value.model_extra["bytelatent"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_of_a_seed_is_that_of_generate(client: openai.OpenAI, blt: BLT, prompt: str) -> None:
    found = client.completions.create(model="tiny-test", prompt=prompt, max_tokens=40, seed=3, temperature=0.7)
    assert found.choices[0].text == blt.generate(prompt, 40, temperature=0.7, seed=3)
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(prompt.encode())
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.model_extra is not None
    assert found.usage.model_extra["patches"]["prompt_patches"] == 1 + len(blt.patch(prompt))


def test_a_stream_is_the_text_in_whole_characters(client: openai.OpenAI, blt: BLT) -> None:
    for seed in range(8):
        expected = alone(blt, "Once", 60, seed=seed)
        chunks = list(
            client.completions.create(
                model="tiny-test",
                prompt="Once",
                max_tokens=60,
                seed=seed,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"bytelatent": True},
            )
        )
        *texts, last = chunks
        assert "".join(chunk.choices[0].text for chunk in texts) == expected.text
        assert [chunk.choices[0].finish_reason for chunk in texts[:-1]] == [None] * (len(texts) - 1)
        assert texts[-1].choices[0].finish_reason in ("stop", "length")
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == len(expected.data)
        details = [extra(chunk) for chunk in texts]
        assert bytes(byte for part in details for byte in part["bytes"]) == expected.data
        starts = blt.read(b"Once" + expected.data).starts[4:].tolist()
        assert [x for part in details for x in part["starts"]] == starts
        assert last.usage.model_extra is not None
        assert last.usage.model_extra["patches"]["completion_patches"] == sum(starts)
        assert all(len(part["alternatives"]) == len(part["bytes"]) for part in details)


def test_samples_of_several_prompts(client: openai.OpenAI, blt: BLT) -> None:
    found = client.completions.create(model="tiny-test", prompt=PROMPTS, max_tokens=20, n=3, seed=5)
    texts = [choice.text for choice in sorted(found.choices, key=lambda choice: choice.index)]
    assert texts == [text for texts in blt.generate(PROMPTS, 20, 3, temperature=1.0, seed=5) for text in texts]
    assert [choice.index for choice in found.choices] == list(range(12))


def test_streams_of_samples_have_their_index(client: openai.OpenAI, blt: BLT) -> None:
    texts = dict.fromkeys(range(3), "")
    for chunk in client.completions.create(model="tiny-test", prompt="x", max_tokens=20, n=3, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == blt.generate("x", 20, 3, temperature=1.0, seed=5)


def test_stop_texts_end_the_text_before_them(client: openai.OpenAI, blt: BLT) -> None:
    whole = blt.generate("Once", 60, temperature=1.0, seed=1)
    stop = next(c for c in whole[10:] if c.isascii() and c.isprintable())
    for streams in (False, True):
        how: dict[str, Any] = {"model": "tiny-test", "prompt": "Once", "max_tokens": 60, "seed": 1}
        how["stop"] = [stop, "never"]
        if streams:
            chunks = list(client.completions.create(**how, stream=True))
            text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
        else:
            choice = client.completions.create(**how).choices[0]
            text, reason = choice.text, choice.finish_reason
        assert text == whole.partition(stop)[0]
        assert reason == "stop"


@pytest.mark.parametrize("streams", [False, True])
def test_log_probabilities_are_the_models(client: openai.OpenAI, blt: BLT, streams: bool) -> None:
    expected = alone(blt, "caf\u00e9", 50, seed=2)
    how: dict[str, Any] = {"model": "tiny-test", "prompt": "caf\u00e9", "max_tokens": 50, "seed": 2, "logprobs": 3}
    if streams:
        parts = [chunk.choices[0] for chunk in client.completions.create(**how, stream=True)]
    else:
        parts = client.completions.create(**how).choices
    text = "".join(part.text for part in parts)
    merged: dict[str, list[Any]] = {}
    for part in parts:
        for key, values in part.logprobs.model_dump().items():
            merged.setdefault(key, []).extend(values)
    data = expected.data
    assert merged["bytes"] == [[byte] for byte in data]
    assert merged["token_logprobs"] == pytest.approx(expected.log_probabilities[: len(data)], abs=1e-5)
    assert merged["tokens"] == [chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}" for byte in data]
    # Each byte's place is that of its character.
    for byte, offset in zip(data, merged["text_offset"], strict=True):
        assert text[offset] == chr(byte) if byte < 128 else not text[offset].isascii()
    log_p = blt.logits(b"caf\xc3\xa9" + data)[0].double().log_softmax(-1)[5:-1]
    for row, tops in zip(log_p, merged["top_logprobs"], strict=True):
        assert sorted(tops.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_prompt_may_be_ids_of_any_bytes(client: openai.OpenAI, blt: BLT) -> None:
    data = b"\xff\xfe caf\xc3"
    ids = [byte + OFFSET for byte in data]
    whole = client.completions.create(model="tiny-test", prompt=[[1, *ids], ids], max_tokens=20, seed=1)
    expected = blt.generate(data, 20, temperature=1.0, seed=1)  # type: ignore[call-overload]
    assert [choice.text for choice in whole.choices] == [expected, expected]


def test_echo_reads_the_prompt_too(client: openai.OpenAI, blt: BLT) -> None:
    prompt = "caf\u00e9 Once"
    found = client.completions.create(model="tiny-test", prompt=prompt, max_tokens=10, seed=1, echo=True, logprobs=2)
    [choice] = found.choices
    assert choice.text == prompt + blt.generate(prompt, 10, temperature=1.0, seed=1)
    assert choice.logprobs is not None
    values = choice.logprobs.token_logprobs
    assert values is not None
    size = len(prompt.encode())
    assert values[:size] == pytest.approx(blt.read(prompt).log_probabilities.tolist(), abs=1e-4)
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[size - 1] == len(prompt) - 1
    score = client.completions.create(model="tiny-test", prompt=prompt, max_tokens=0, echo=True, logprobs=0)
    assert score.choices[0].text == prompt
    assert score.choices[0].logprobs is not None
    assert score.choices[0].logprobs.token_logprobs == pytest.approx(values[:size], abs=1e-5)
    assert score.usage is not None
    assert score.usage.completion_tokens == 0


def test_a_prompt_that_ends_within_a_character_is_echoed(served: Served) -> None:
    ids = [byte + OFFSET for byte in b"caf\xc3"]
    cut = served.post("/v1/completions", {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}).json()
    assert cut["choices"][0]["text"] == "caf\ufffd"
    assert cut["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert cut["usage"]["completion_tokens"] == 0


def test_what_leaves_out_a_seed_differs(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model="tiny-test", prompt="x", max_tokens=30).choices[0].text for _ in range(4)}
    assert len(texts) == 4


def test_under_load_a_text_is_what_it_is_alone(client: openai.OpenAI, blt: BLT) -> None:
    def ask(seed: int) -> str:
        found = client.completions.create(model="tiny-test", prompt=f"{seed} times", max_tokens=30 + seed, seed=seed)
        return found.choices[0].text

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(24)))
    expected = [blt.generate(f"{seed} times", 30 + seed, temperature=1.0, seed=seed) for seed in range(24)]
    assert texts == expected


def test_sampling_settings_of_our_own(client: openai.OpenAI, blt: BLT) -> None:
    own = {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.3, "valid_utf8": True}
    found = client.completions.create(
        model="tiny-test", prompt="Once", max_tokens=40, seed=9, temperature=0.9, top_p=0.8, extra_body=own
    )
    assert found.choices[0].text == blt.generate("Once", 40, temperature=0.9, top_p=0.8, seed=9, **own)


def test_events_are_as_sent_to_curl(served: Served) -> None:
    body = {"prompt": "x", "max_tokens": 5, "seed": 1, "stream": True}
    with served.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = response.read().decode()
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


def test_scores_are_bits_per_byte(served: Served, blt: BLT) -> None:
    texts = ["some text", "caf\u00e9 " * 30, *["x" * size for size in range(1, 90)]]
    found = served.post("/v1/score", {"texts": texts, "log_probabilities": True}).json()["data"]
    assert [each["bits_per_byte"] for each in found] == pytest.approx(blt.bits_per_byte(texts).per_text, abs=1e-4)
    assert found[0]["log_probability"] == pytest.approx(sum(found[0]["log_probabilities"]))
    without_end = served.post("/v1/score", {"texts": texts[0], "end": False}).json()["data"][0]
    expected = float(blt.read(texts[0], context=blt.context).log_probabilities.sum())
    assert without_end["log_probability"] == pytest.approx(expected, abs=1e-3)
    assert without_end["bits_per_byte"] == pytest.approx(-expected / math.log(2) / 9, abs=1e-4)


@pytest.mark.parametrize("context", [100, 700])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("patching", [{}, {"mode": "static", "patch_size": 3}, {"mode": "space"}])
def test_a_long_text_is_scored_as_blt_reads_it(
    blt: BLT, monkeypatch: pytest.MonkeyPatch, context: int, end: bool, patching: dict[str, Any]
) -> None:
    """Piece by piece, here of 64 ids, while the context is as long as told."""
    monkeypatch.setattr(blt, "context", context)
    if patching:
        monkeypatch.setattr(blt, "patching", PatchSettings.parse(patching))
    scheduler = Scheduler(blt, batch_size=1, max_waiting=1, prefill_chunk=64, prefix_cache_bytes=0)
    try:
        texts = [("The caf\u00e9 of \u4f60 is open. " * 40)[:size].encode() for size in (3, 64, 100, 700)]
        with ThreadPoolExecutor() as apart:  # a browser's tests leave a loop running in this thread
            found = apart.submit(asyncio.run, Backend(blt, scheduler).score(texts, end, True)).result()
    finally:
        scheduler.close()
    for mine, expected in zip(found, blt.read(texts, context=context, end=end), strict=True):
        assert mine["log_probabilities"] == pytest.approx(expected.log_probabilities.tolist(), abs=1e-4)
        assert (mine["bytes"], mine["patches"]) == (len(expected.data), int(expected.starts.sum()))


@pytest.mark.parametrize("size", [0, 1, 20, 5000])
def test_patches_are_those_of_blt_patch(served: Served, blt: BLT, size: int) -> None:
    """A long text, too, whose entropies are read piece by piece."""
    text = ("The caf\u00e9 of \u4f60 is open. " * 400)[:size]
    found = served.post("/v1/patches", {"text": text}).json()
    expected = blt.patch(text)
    assert [(p["start"], p["end"], p["text"]) for p in found["patches"]] == [(p.start, p.end, p.text) for p in expected]
    assert found["entropies"] == pytest.approx([e for patch in expected for e in patch.entropies or []], abs=1e-4)


def test_ids_and_back(served: Served) -> None:
    found = served.post("/tokenize", {"prompt": "caf\u00e9"}).json()
    assert found["tokens"] == encode("caf\u00e9", eos=False).tolist()
    assert found["count"] == 6
    assert served.post("/detokenize", {"tokens": found["tokens"]}).json()["prompt"] == "caf\u00e9"
