"""Downloads of models that break, are killed, or run at the same time."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from bytelatent.files import only_writer
from bytelatent.hub.repository import part_of
from tests.hub.model_folders import BIG, MODEL, NAME, error_of, files_asked_for, get, head, place, visible, write
from tests.hub_server import HubServer


@pytest.mark.parametrize("redirects", [False, True])
def test_a_broken_connection_costs_only_the_rest(redirects: bool, server: HubServer) -> None:
    server.repositories["model", NAME].redirects = redirects
    server.break_after("model.safetensors", 300_000, times=2)
    assert visible(get()) == MODEL
    assert server.bytes_sent["model.safetensors"] == len(BIG)


PROGRAM = (
    "import sys; from bytelatent.errors import guarded; from bytelatent.hub import model_folder;"
    f"guarded(lambda: print(model_folder('{NAME}')))"
)


def another_process(server: HubServer, home: Path) -> "subprocess.Popen[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = clean | server.environment | {"HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(is_so: Any) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stopped_in_the_middle(sent: signal.Signals, code: int, server: HubServer, tmp_path: Path) -> None:
    held = 700_000
    server.hold_after("model.safetensors", held)
    folder = place(tmp_path) / "snapshots" / head(server)
    part = part_of(folder / "model.safetensors")
    others = {path: data for path, data in MODEL.items() if path != "model.safetensors"}
    with another_process(server, tmp_path) as process:
        wait_until(lambda: part.is_file() and part.stat().st_size == held and visible(folder) == others)
        process.send_signal(sent)
        process.communicate()
    assert process.returncode == code
    assert "does not hold all of" in error_of(local_files_only=True)
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.snapshot_download(NAME, local_files_only=True)
    server.requests.clear()
    server.bytes_sent.clear()
    assert visible(get()) == MODEL
    assert files_asked_for(server) == {"GET model.safetensors": 1}
    assert server.bytes_sent["model.safetensors"] == len(BIG) - held
    assert not part.exists()


def test_a_second_process_waits_for_the_first(server: HubServer, tmp_path: Path) -> None:
    """What the first one has downloaded meanwhile is not downloaded again."""
    folder = place(tmp_path) / "snapshots" / head(server)
    with ExitStack() as both:
        with only_writer(tmp_path / "hub" / ".locks" / place(tmp_path).name):
            second = both.enter_context(another_process(server, tmp_path))
            assert second.stderr is not None
            assert second.stderr.readline() == f"{NAME} is being downloaded by another process; waiting for it\n"
            assert not folder.exists()
            write(folder, {"model.safetensors": BIG})
        out, _ = second.communicate()
    assert out == f"{folder}\n"
    assert visible(folder) == MODEL
    assert server.requests["GET model.safetensors"] == 0


def test_whoever_waits_can_be_stopped(server: HubServer, tmp_path: Path) -> None:
    with only_writer(tmp_path / "hub" / ".locks" / place(tmp_path).name), another_process(server, tmp_path) as second:
        assert second.stderr is not None
        second.stderr.readline()
        second.send_signal(signal.SIGINT)
        second.communicate()
    assert second.returncode == 130


def test_two_processes_at_once(server: HubServer, tmp_path: Path) -> None:
    with another_process(server, tmp_path) as one, another_process(server, tmp_path) as two:
        folders = {process.communicate()[0].strip() for process in (one, two)}
    assert (one.returncode, two.returncode) == (0, 0)
    assert folders == {str(get(local_files_only=True))}
    assert files_asked_for(server) == {f"GET {path}": 1 for path in MODEL}
