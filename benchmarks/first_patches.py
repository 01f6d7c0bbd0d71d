"""How long a newcomer waits: from the command `blt serve` to the page, and to the first patches of a text.

python benchmarks/first_patches.py [--runs 3] [-- COMMAND...]

COMMAND is `blt serve` of this environment if left out. Each run begins in an empty folder, so that the server takes the
model in the package. CPU seconds are those of the server and its threads, which other programs do not lengthen.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

TEXT = "Daenerys Targaryen is in Game of Thrones"
PORT = 18764


def answered(path: str, body: dict[str, str] | None = None) -> bytes | None:
    """What the server answers with status 200; None while it does not."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()
    except (urllib.error.URLError, ConnectionError):
        return None


def waited(begin: float, server: subprocess.Popen[bytes], path: str, body: dict[str, str] | None = None) -> float:
    while not answered(path, body):
        if server.poll() is not None:
            sys.exit(f"the server ended with code {server.returncode}")
        time.sleep(0.05)
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("command", nargs="*", default=[str(Path(sys.executable).with_name("blt")), "serve", "--quiet"])
    given = parser.parse_args()
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory() as folder:
            before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            server = subprocess.Popen([*given.command, "--port", str(PORT)], cwd=folder, env={**os.environ})
            page = waited(begin, server, "/")
            waited(begin, server, "/ready")
            patches = waited(begin, server, "/v1/patches", {"text": TEXT})
            server.terminate()
            server.wait(60)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
            print(f"page {page:.2f} s, first patches {patches:.2f} s, {cpu:.2f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
