"""A server on a tiny model, and a real browser that opens its page."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bytelatent.blt import BLT
from bytelatent.patching import PatchSettings
from tests.model.tiny import tiny_blt
from tests.test_blt import wrap

CHROMIUM = Path("/usr/bin/chromium")
EXECUTABLE = [sys.executable, "-m", "bytelatent"]
NAMES = ["one", "two"]  # of the same model


def tiny_model(folder: Path) -> BLT:
    """A model whose patches have about three bytes."""
    blt = wrap(tiny_blt(window=6))
    text = "The quick brown fox jumps over the lazy dog. " * 4
    entropies = blt.read(text).entropies
    assert entropies is not None
    blt.patching = PatchSettings(mode="entropy", threshold=float(torch.quantile(entropies, 0.66)))
    blt.save_pretrained(folder)
    return BLT.from_pretrained(folder, device="cpu")


@contextmanager
def served(model: str | Path, *options: str) -> Iterator[str]:
    """The address of a server, a process of its own, that ends with the block."""
    command = [*EXECUTABLE, "serve", str(model), "--port", "0", "--device", "cpu", *options]
    environment = {key: value for key, value in os.environ.items() if key != "BLT_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                break
        output = "".join(lines)
        assert process.poll() is None, output
        [address] = re.findall(r"open (http://\S+)", output)
        # Read on, so that the server never waits for a full pipe.
        threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True).start()
        yield address
    finally:
        process.terminate()
        process.wait(30)
