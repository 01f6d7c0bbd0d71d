"""Streams of captured steps, with PyTorch's pool of streams stood in for."""

from itertools import cycle

import pytest
import torch

from bytelatent.inference.step import cuda_graph
from bytelatent.inference.step.cuda_graph import SideStream


def test_parts_that_run_at_once_never_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps were made before: PyTorch gives one of 32 streams in turn."""
    pool = cycle(range(32))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: next(pool))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda_graph._streams.cache_clear()
    try:
        for _ in range(40):
            sides = {SideStream(torch.device("cuda"), part)._stream for part in ("byte LM", "closing")}
            inside = {cuda_graph._streams(0)[part] for part in ("graph", "condition")}
            assert len(sides | inside) == 4
            next(pool)  # others take streams, too
    finally:
        cuda_graph._streams.cache_clear()
    assert SideStream(torch.device("cpu"))._stream is None
