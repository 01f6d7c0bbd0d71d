"""Bad requests: each gets an error in OpenAI's shape, quickly, and a line in the log that says why."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving.conftest import Served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
# A path, a body, the status, and words of the message.
REFUSED: list[tuple[str, Any, int, str]] = [
    (COMPLETIONS, {}, 400, "prompt: Field required"),
    (COMPLETIONS, [], 400, "no JSON object"),
    (COMPLETIONS, "text", 400, "no JSON object"),
    (COMPLETIONS, None, 400, "no JSON object"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt: it takes a text, ids from 0 to 259"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt: it takes"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt: it takes"),
    (COMPLETIONS, {"prompt": [1, 260]}, 400, "prompt: it takes"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt: it takes"),
    (COMPLETIONS, {"prompt": "x" * 20_001}, 400, "the prompt has 20,001 bytes, and this server takes 20,000"),
    (COMPLETIONS, {"prompt": "\ud800"}, 400, "half of a surrogate pair"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens: 0 gives nothing"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": -5}, 400, "max_tokens: Input should be greater"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 10**9}, 400, "max_tokens: 1,000,000,000 bytes are more than"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, 400, "max_tokens: Input should be a valid integer, not '5'"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 5.5}, 400, "max_tokens: Input should be a valid integer"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": True}, 400, "max_tokens: Input should be a valid integer"),
    (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n: Input should be greater"),
    (COMPLETIONS, {"prompt": "x", "n": 100_000}, 400, "n: 100,000 texts of 1 prompt are more than the 64"),
    (COMPLETIONS, {"prompt": ["x"] * 65}, 400, "prompt: 65 prompts are more than the 64 of a request here"),
    (COMPLETIONS, {"prompt": ["x"] * 40, "n": 2}, 400, "n: 2 texts of 40 prompts are more than the 64"),
    (COMPLETIONS, {"prompt": "x", "temperature": -0.1}, 400, "temperature: Input should be greater"),
    (COMPLETIONS, {"prompt": "x", "temperature": float("nan")}, 400, "temperature: Input should be a finite number"),
    (COMPLETIONS, {"prompt": "x", "temperature": float("inf")}, 400, "temperature: Input should be"),
    (COMPLETIONS, {"prompt": "x", "top_p": 1.5}, 400, "top_p: Input should be less"),
    (COMPLETIONS, {"prompt": "x", "top_k": 0}, 400, "top_k: Input should be greater"),
    (COMPLETIONS, {"prompt": "x", "min_p": 2}, 400, "min_p: Input should be less"),
    (COMPLETIONS, {"prompt": "x", "seed": 2**64}, 400, "seed: Input should be"),
    (COMPLETIONS, {"prompt": "x", "seed": 1.5}, 400, "seed: Input should be a valid integer"),
    (COMPLETIONS, {"prompt": "x", "stop": [""]}, 400, "stop: "),
    (
        COMPLETIONS,
        {"prompt": "x", "stop": ["a"] * 17},
        400,
        "stop: it takes a text, or up to 16 of them, of 1 to 1,024",
    ),
    (COMPLETIONS, {"prompt": "x", "stop": "\ud800"}, 400, "stop: '\\ud800' at character 1 is half of a surrogate pair"),
    (COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": "a\ud800"}}, 400, "structured_outputs: '\\ud800'"),
    (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": ["\udfff"]}}, 400, "structured_outputs: '\\udfff'"),
    (COMPLETIONS, {"prompt": "x", "response_format": {"\ud800": {}}}, 400, "response_format: '\\ud800' at"),
    (CHAT, {"messages": [{"role": "user", "content": "a\udc80"}]}, 400, "messages.0.content: '\\udc80' at character 2"),
    ("/v1/score", {"texts": ["\ud800"]}, 400, "texts: '\\ud800' at"),
    ("/v1/patches", {"text": "\ud800"}, 400, "text: '\\ud800' at"),
    ("/tokenize", {"prompt": "\udcff"}, 400, "prompt: '\\udcff' at"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 10**6}, 400, "max_completion_tokens: 1,000,000 bytes are more"),
    (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, 400, "messages.0.tool_calls: "),
    (COMPLETIONS, {"prompt": "x", "logprobs": 21}, 400, "logprobs: Input should be less"),
    (COMPLETIONS, {"prompt": "x", "logprobs": True}, 400, "logprobs: Input should be a valid integer"),
    (COMPLETIONS, {"prompt": "x", "stream": "yes"}, 400, "stream: Input should be a valid boolean"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {}}, 400, "stream_options: it goes with stream=true"),
    (COMPLETIONS, {"prompt": "x", "best_of": 3}, 400, "best_of: it is not supported"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix: 'y' is not supported"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias: {'5': 1} is not supported"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": 1}, 400, "repetition_penalty"),
    (COMPLETIONS, {"prompt": "x", "temprature": 1}, 400, "did you mean 'temperature'?"),
    (COMPLETIONS, {"prompt": "x", "model": "gpt-4"}, 404, "there is no model 'gpt-4' here"),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "nonsense"}}, 400, "response_format"),
    (CHAT, {}, 400, "messages: Field required"),
    (CHAT, {"messages": []}, 400, "messages: List should have at least 1 item"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role: Input should be"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content: Field required"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "there are no tools"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs: it goes with logprobs=true"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 0}, 400, "max_completion_tokens: Input should be greater"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, 400, "response_format"),
    ("/v1/patches", {"text": "x", "modes": ["bpe:/etc/passwd"]}, 400, "there is no mode"),
    ("/v1/patches", {"text": "x", "modes": ["spice"]}, 400, "there is no mode"),
    ("/v1/patches", {"text": "x", "threshold": "1"}, 400, "threshold: Input should be a valid number"),
    ("/v1/score", {"texts": []}, 400, "texts: "),
    ("/v1/score", {"texts": "x" * 20_001}, 400, "a text has 20,001 bytes"),
    ("/detokenize", {"tokens": [260]}, 400, "tokens"),
    ("/tokenize", {"prompt": None}, 400, "prompt: Input should be a valid string"),
    ("/v1/nothing", {}, 404, "there is no /v1/nothing here"),
    ("/v1/models", {}, 405, "takes GET, not POST"),
]


def checked(response: Any, status: int) -> str:
    """The message of an error, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(key, error)] = response.json().items()
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return error["message"]


@pytest.mark.parametrize(("path", "body", "status", "words"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_a_bad_request_is_refused(served: Served, path: str, body: Any, status: int, words: str) -> None:
    began = time.monotonic()
    response = served.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert words in checked(response, status)
    assert time.monotonic() - began < 10
    line = served.logged(response.headers["x-request-id"])
    assert f"POST {path} {status}" in line
    assert words.split(":")[0].split("'")[0] in line


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "the body is empty"),
        (b"{", 400, "the body is no JSON"),
        (b'{"prompt": "\xff"}', 400, "no JSON text in UTF-8"),
        (b"[" * 100_000, 400, "no JSON"),
        (b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", 400, "no JSON"),
        (b'{"prompt": "' + b"x" * 1_100_000 + b'"}', 413, "larger than 1,048,576 bytes"),
    ],
    ids=["empty", "cut", "latin-1", "deep", "digits", "megabyte"],
)
def test_a_body_that_cannot_be_read(served: Served, content: bytes, status: int, words: str) -> None:
    json_type = {"Content-Type": "application/json"}
    assert words in checked(served.client.post(COMPLETIONS, content=content, headers=json_type), status)

    def chunks() -> Iterator[bytes]:  # without a length
        for at in range(0, len(content), 50_000):
            yield content[at : at + 50_000]

    assert words in checked(served.client.post(COMPLETIONS, content=chunks(), headers=json_type), status)


def test_only_json_is_read(served: Served) -> None:
    """What a form on a page of another site can send is none."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = served.client.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert "Content-Type: application/json" in checked(response, 415)


def raw(served: Served, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the server answers to bytes that are sent slowly, until it closes the connection."""
    host, _, port = served.address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break
            time.sleep(pause)
        answer = b""
        while True:
            try:
                new = connection.recv(65_536)
            except ConnectionResetError:
                return answer
            if not new:
                return answer
            answer += new


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_targets_in_absolute_form(served: Served) -> None:
    """As clients send them that take the server for a proxy; the host within is the one that counts."""

    def status(target: str) -> bytes:
        return raw(served, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())[:12]

    for target in ("http://localhost/health", "HTTP://127.0.0.1:80/v1/models?a=b", "http://localhost"):
        assert status(target) == b"HTTP/1.1 200", target
    assert status("http://localhost/nothing") == b"HTTP/1.1 404"
    assert status("http://elsewhere.example/health") == b"HTTP/1.1 403"


def test_slow_clients_are_cut_off(served: Served) -> None:
    with ThreadPoolExecutor(6) as pool:
        silent = pool.submit(raw, served)
        head = pool.submit(raw, served, *[HEAD[at : at + 2] for at in range(0, 40, 2)], pause=0.2)
        body = pool.submit(raw, served, HEAD + b"Content-Length: 100\r\n\r\n", b"{", b" ", pause=0.1)
        chunk = pool.submit(raw, served, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n", pause=0.1)
        second = pool.submit(raw, served, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /", pause=0.3)
        piped = pool.submit(raw, served, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /")
        assert silent.result() == b""
        assert head.result().startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 2 s" in head.result()
        for sent in (body, chunk):
            assert sent.result().startswith(b"HTTP/1.1 408 ")
            assert b'"code": "request_timeout"' in sent.result()
        for sent in (second, piped):
            assert sent.result().startswith(b"HTTP/1.1 200 ")
            assert b"HTTP/1.1 408 " in sent.result()
            assert sent.result().count(b"x-request-id: req-") == 2


def test_what_is_no_http_is_refused_in_shape(served: Served) -> None:
    answer = raw(served, b"\x16\x03\x01 nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    too_long = raw(served, b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100_000)
    assert too_long.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))


def test_a_body_that_breaks_has_one_line(served: Served) -> None:
    head = HEAD + b"X-Request-Id: broken-1\r\nTransfer-Encoding: chunked\r\n"
    answer = raw(served, head + b"\r\n", b"zz\r\n", pause=0.2)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: broken-1\r\n" in answer
    assert " 400, " in served.logged("broken-1")
    assert served.log().count("broken-1") == 1
    both = raw(served, head.replace(b"broken", b"both") + b"Content-Length: 5\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert both.count(b"HTTP/1.1 ") == 1
    assert b"do not go together" in both


def test_methods(served: Served) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/"):
        response = served.client.head(path)
        assert response.status_code == 200
        assert response.content == b""
        assert int(response.headers["content-length"]) > 0
    assert served.client.head(COMPLETIONS).status_code == 405
    assert 'route="/v1/models",status="200"' in served.client.get("/metrics").text
    assert "GET, not TRACE" in checked(served.client.request("TRACE", "/"), 405)


def test_names_of_other_sites_are_refused(served: Served) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "[::1]evil.example", ""):
        assert "is not one of this server" in checked(served.client.get("/v1/models", headers={"Host": host}), 403)
    for host in ("localhost", "127.0.0.1:80", "[::1]:8000", "LOCALHOST", "localhost."):
        assert served.client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_there_is_no_cors_unless_asked_for(served: Served) -> None:
    origin = {"Origin": "https://site.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in served.client.get("/v1/models", headers=origin).headers
    assert "access-control-allow-origin" not in served.client.options(COMPLETIONS, headers=origin).headers


def test_request_ids_come_back(served: Served) -> None:
    assert served.client.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {
        served.client.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"]
        for given in ("", "x" * 999, "a, 200: b")
    }
    assert len(made) == 3
    assert all(one.startswith("req-") for one in made)
