"""`/v1/chat/completions` with OpenAI's own client."""

import openai
import pytest

from bytelatent import BLT
from bytelatent.text.chat import DEFAULT_TEMPLATE
from tests.serving.conftest import Served

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "caf\u00e9"}, {"type": "text", "text": "?"}]},
]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)


def answer(blt: BLT, messages: list, size: int, seed: int) -> str:  # type: ignore[type-arg]
    stops = list(DEFAULT_TEMPLATE.stops)
    return blt.generate(DEFAULT_TEMPLATE.render(messages), size, temperature=1.0, seed=seed, stop=stops)


def test_an_answer_is_what_follows_the_template(client: openai.OpenAI, blt: BLT) -> None:
    found = client.chat.completions.create(model="tiny-test", messages=MESSAGES, max_completion_tokens=40, seed=3)  # type: ignore[arg-type]
    [choice] = found.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == answer(blt, MESSAGES, 40, 3)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(DEFAULT_TEMPLATE.render(MESSAGES))


def test_an_answer_may_be_sent_back(client: openai.OpenAI, blt: BLT) -> None:
    first = client.chat.completions.create(model="tiny-test", messages=MESSAGES, max_tokens=20, seed=3)  # type: ignore[arg-type]
    message = first.choices[0].message
    more = [*MESSAGES, message, {"role": "user", "content": "And?"}]
    again = client.chat.completions.create(model="tiny-test", messages=more, max_tokens=20, seed=4)  # type: ignore[arg-type]
    plain = [*MESSAGES, {"role": "assistant", "content": message.content}, {"role": "user", "content": "And?"}]
    assert again.choices[0].message.content == answer(blt, plain, 20, 4)


def test_a_stream_with_log_probabilities(client: openai.OpenAI, blt: BLT) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny-test",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=40,
            seed=5,
            n=2,
            stream=True,
            logprobs=True,
            top_logprobs=2,
            stream_options={"include_usage": True},
        )
    )
    *parts, last = chunks
    texts, tokens = {0: "", 1: ""}, {0: [], 1: []}  # type: ignore[var-annotated]
    for chunk in parts:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.logprobs is not None and choice.logprobs.content:
            tokens[choice.index] += choice.logprobs.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert texts[0] == answer(blt, MESSAGES, 40, 5)
    assert texts[1] == answer(blt, MESSAGES, 40, 6)
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(map(len, tokens.values()))
    for index, text in texts.items():
        data = bytes(byte for token in tokens[index] for byte in token.bytes)
        assert data.decode("utf-8", "replace") == text
        assert all(len(token.top_logprobs) == 2 for token in tokens[index])
        assert all(token.top_logprobs[0].logprob >= token.logprob - 1e-5 for token in tokens[index])


def test_models_are_listed_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-test"]
    assert client.models.retrieve("tiny-test").id == "tiny-test"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as absent:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)  # type: ignore[arg-type]
    assert absent.value.code == "model_not_found"
    assert absent.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model="tiny-test", messages=MESSAGES, temperature=-1)  # type: ignore[arg-type]
    assert bad.value.param == "temperature"
