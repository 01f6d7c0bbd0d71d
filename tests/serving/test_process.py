"""`blt serve` as a process: starting, keys, a full queue, clients that leave, an end in good order."""

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bytelatent import BLT
from tests import processes
from tests.serving.conftest import COMMAND, ENVIRONMENT, Served

LONG = {"prompt": "x", "max_tokens": 100_000, "temperature": 0}
Start = Callable[..., Served]


def refused(folder: Path, *arguments: str, **environment: str) -> str:
    """The one line with which the command ends."""
    ended = processes.ended([*COMMAND, str(folder), *arguments], ENVIRONMENT | environment)
    assert ended.returncode == 2, ended.stderr
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ended.stderr
    return line


def test_bad_settings_end_with_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(folder, "--port", str(port))
        assert f"127.0.0.1:{port} cannot be had (Address already in use); take another: --port {port + 1}" in line
    assert "is no address of this machine" in refused(folder, "--host", "no-such-host.invalid", "--port", "0")
    assert "no-such-model" in refused(tmp_path / "no-such-model", "--port", "0")
    (tmp_path / "keys").write_text("\n")
    assert "holds no key" in refused(folder, "--api-key-file", str(tmp_path / "keys"))
    for keys, words in ((b"# of Mary\n", "holds no key"), (b"#\n\xff\xfe", "line 2 of"), (b"two words", "line 1 of")):
        (tmp_path / "keys").write_bytes(keys)
        assert words in refused(folder, "--api-key-file", str(tmp_path / "keys"))
    assert "BLT_API_KEY: a key is of ASCII" in refused(folder, BLT_API_KEY="caf\xe9")
    assert "cannot be read" in refused(folder, "--api-key-file", str(tmp_path / "absent"))
    assert "BLT_API_KEY: it is empty" in refused(folder, BLT_API_KEY="")


def test_the_address_is_printed_before_torch_is_imported(folder: Path) -> None:
    program = (
        "import sys, bytelatent.commands.serve as serve, bytelatent.terminal as terminal\n"
        "from bytelatent.commands.serve_options import ServeSettings\n"
        "def line(text):\n"
        "    sys.exit(f\"{'torch' in sys.modules} {text}\")\n"
        "serve.print_line = line\n"
        f"serve.run(ServeSettings(model={str(folder)!r}, port=0))\n"
    )
    command = [COMMAND[0], "-c", program]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ended.stderr.splitlines()[-1].startswith("False serving ")


def test_a_key_is_asked_for_and_never_shown(start: Start, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# no-key\nfirst-key\n  second-key  \n")
    served = start("--api-key-file", str(tmp_path / "keys"))
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer # no-key"},
        {"Authorization": "Basic first-key"},
    ):
        response = served.client.get("/v1/models", headers=header)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("first-key", "second-key"):
        client = openai.OpenAI(base_url=f"{served.address}/v1", api_key=key)
        assert [model.id for model in client.models.list()] == ["tiny-test"]
    wrong = openai.OpenAI(base_url=f"{served.address}/v1", api_key="wrong-key")
    with pytest.raises(openai.AuthenticationError):
        wrong.completions.create(model="tiny-test", prompt="x")
    assert served.client.get("/health").status_code == 200
    assert served.client.get("/metrics").status_code == 401
    assert served.client.get("/").status_code == 200  # the page asks for the key
    assert "-key" not in served.log() + served.output()


def test_a_key_of_the_environment(start: Start) -> None:
    served = start(environment={"BLT_API_KEY": "secret"})
    assert served.client.get("/v1/models").status_code == 401
    assert served.client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_sites_that_are_allowed(start: Start) -> None:
    served = start("--allow-origin", "https://site.example", "--allow-host", "models.example", "--name", "second")
    asked = {"Origin": "https://site.example", "Access-Control-Request-Method": "POST"}
    preflight = served.client.options("/v1/completions", headers=asked)
    assert preflight.headers["access-control-allow-origin"] == "https://site.example"
    assert served.client.get("/v1/nothing", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
    other = served.client.options("/v1/completions", headers={**asked, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    listed = served.client.get("/v1/models", headers={"Host": "models.example"}).json()
    assert [model["id"] for model in listed["data"]] == ["tiny-test", "second"]
    assert (
        served.post("/v1/completions", {"prompt": "x", "max_tokens": 2, "model": "second"}).json()["model"] == "second"
    )


def leave(served: Served, streams: bool) -> None:
    """Ask for a long text, and close the connection after its first bytes, or after half a second."""
    timeout = httpx.Timeout(30, read=0.5)
    with suppress(httpx.ReadTimeout), events(served, {**LONG, "stream": streams}, timeout) as lines:
        next(lines)


@contextmanager
def events(served: Served, body: dict[str, Any], timeout: Any = 60) -> Iterator[Iterator[str]]:
    """The lines of a stream."""
    with (
        httpx.Client(base_url=served.address, timeout=timeout) as client,
        client.stream("POST", "/v1/completions", json={"stream": True, **body}) as response,
    ):
        yield (line for line in response.iter_lines() if line)


def text_of(line: str) -> str:
    return json.loads(line.removeprefix("data: "))["choices"][0]["text"] if line.startswith("data: {") else ""


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_slot(served: Served, streams: bool) -> None:
    for _ in range(6):  # more than there are slots
        leave(served, streams)
    began = time.monotonic()
    served.must_become_idle()
    assert time.monotonic() - began < 5
    assert "client closed the connection" in served.logged(" 499, ")
    assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 3}).status_code == 200


def test_a_full_queue_refuses(start: Start) -> None:
    served = start("--batch-size", "1", "--max-waiting", "2", "--max-new-bytes", "100000")
    with ThreadPoolExecutor(3) as pool:
        stops = threading.Event()

        def hold() -> None:
            with events(served, LONG):
                stops.wait()

        held = [pool.submit(hold) for _ in range(3)]
        served.wait_for(lambda: served.metrics()["bytelatent_busy_slots"] + served.metrics()["bytelatent_waiting"] == 3)
        response = served.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        never = served.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 5})
        assert never.status_code == 400
        assert never.json()["error"]["message"].startswith("n: 2 texts of 2 prompts are more than the 3 ")
        assert never.json()["error"]["param"] == "n"
        assert served.metrics()["bytelatent_refused_jobs_total"] == 1
        stops.set()
        for one in held:
            one.result()
    served.must_become_idle()
    # OpenAI's client waits as it is asked to, and tries again.
    client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="none")
    with ThreadPoolExecutor(6) as pool:
        ask = lambda seed: client.completions.create(model="tiny-test", prompt="x", max_tokens=20, seed=seed)  # noqa: E731
        assert all(found.choices[0].text for found in pool.map(ask, range(3)))


def test_time_ends_an_answer(start: Start) -> None:
    served = start("--max-seconds", "0.5", "--max-new-bytes", "100000", "--prefill-chunk", "1")
    for path, body in (
        ("/v1/score", {"texts": "x" * 60_000}),
        ("/v1/completions", {"prompt": "x" * 60_000, "max_tokens": 0, "echo": True, "logprobs": 1}),
    ):
        response = served.post(path, body)
        assert response.status_code == 400
        assert "it takes longer than the 0.5 s of this server" in response.text
    began = time.monotonic()
    found = served.post("/v1/completions", LONG).json()
    assert time.monotonic() - began < 20
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] < 100_000
    served.must_become_idle()


def test_running_requests_end_before_the_server_does(start: Start, blt: BLT) -> None:
    served = start("--drain-seconds", "60", "--max-new-bytes", "100000")
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 1500, "temperature": 0}
    text, refused = "", None
    with events(served, body) as lines:
        for line in lines:
            text += text_of(line)
            if refused is None:
                served.process.send_signal(signal.SIGTERM)
                served.wait_for(lambda: served.client.get("/ready").status_code == 503)
                refused = served.post("/v1/completions", {"prompt": "x"})
                assert served.client.get("/health").json()["status"] == "draining"
    assert refused is not None
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert text == blt.generate("x", 1500, temperature=0)
    assert served.process.wait(30) == 0
    assert "stopped" in served.log()


def test_what_does_not_end_in_time_is_cut_short(start: Start) -> None:
    served = start("--drain-seconds", "0.5", "--max-new-bytes", "100000")
    with events(served, LONG) as lines:
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        *_, last, done = lines
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert served.process.wait(30) == 0
    assert "drain: 1 request is cut short after 0.5 s" in served.log()


def test_a_text_that_is_read_neither_stops_streams_nor_outlives_its_client(start: Start) -> None:
    served = start("--max-new-bytes", "100000")
    body = {"texts": "some text " * 6000}
    num_lines = 0
    with ThreadPoolExecutor(1) as pool, events(served, LONG) as lines:
        next(lines)
        reading = pool.submit(served.post, "/v1/score", body)
        while not reading.done():
            next(lines)
            num_lines += 1
        assert reading.result().status_code == 200
    assert num_lines > 30  # between its pieces a stream goes on
    with suppress(httpx.ReadTimeout):
        httpx.post(f"{served.address}/v1/score", json=body, timeout=httpx.Timeout(30, read=0.2))
    assert "client closed the connection" in served.logged("/v1/score 499, ")


def test_what_is_read_ends_with_the_drain(start: Start) -> None:
    served = start("--drain-seconds", "0.2", "--prefill-chunk", "1")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(served.post, "/v1/score", {"texts": "x" * 60_000})
        served.wait_for(lambda: served.metrics()["bytelatent_http_open_requests"] == 2)
        time.sleep(0.3)
        began = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert reading.result().status_code == 503
    assert served.process.wait(30) == 0
    assert time.monotonic() - began < 5
    assert "stopped" in served.log()


def test_a_second_signal_ends_at_once(start: Start) -> None:
    served = start("--drain-seconds", "600", "--max-new-bytes", "100000")
    with events(served, LONG) as lines:
        next(lines)
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(30) == 130
    assert "stopped: without waiting for the running requests" in served.log()
    assert "Traceback" not in served.log()


def test_metrics_are_prometheus_and_count(served: Served) -> None:
    before = served.metrics()
    found = served.post("/v1/completions", {"prompt": "some prompt", "max_tokens": 30, "seed": 1}).json()
    after = served.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("bytelatent_generated_bytes_total") == found["usage"]["completion_tokens"]
    assert grown("bytelatent_generated_patches_total") == found["usage"]["patches"]["completion_patches"]
    assert grown("bytelatent_time_to_first_byte_seconds_count") == 1
    assert grown('bytelatent_http_requests_total{route="/v1/completions",status="200"}') == 1
    assert after["bytelatent_slots"] == 4
    assert after["bytelatent_http_open_requests"] == 1  # this one
