"""Batches made ahead of the training are those of the loader, and so are the positions after them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.data import DataSettings, Loader, Patcher, PrefetchLoader, SourceSettings
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.training import trainer as loop
from tests.data.test_loader import same, sources, text
from tests.model.tiny import tiny_byte_lm
from tests.processes import forked_readers

__all__ = ["sources"]
CPU = torch.device("cpu")


def loaders(sources: list[SourceSettings], workers: int = 0) -> tuple[Loader, PrefetchLoader]:
    settings = DataSettings(
        train=sources, context=20, batch_bytes=48, batch_patches=24, shuffle_buffer=5, workers=workers
    )
    patcher = Patcher(PatchSettings(mode="entropy", threshold=5.2), tiny_byte_lm())
    return Loader(settings, 3, patcher), PrefetchLoader(Loader(settings, 3, patcher), CPU)


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def test_batches_for_a_gpu_are_pinned(sources: list[SourceSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    plain, ahead = loaders(sources)
    ahead._stream = object()  # type: ignore[assignment]
    with plain, ahead:
        batch = next(ahead)
        assert same(next(plain), batch)
    given = [*batch.stream.tensors.values(), batch.targets]
    assert len(given) > 5
    assert all(any(tensor is one for one in pinned) for tensor in given)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_batches_and_positions(
    sources: list[SourceSettings], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked_readers(monkeypatch)
    threads = torch.get_num_threads()
    plain, ahead = loaders(sources, workers)
    with plain, ahead:
        assert ahead._thread.submit(torch.get_num_threads).result() == 1
        assert alike(plain.state_dict(), ahead.state_dict())
        for _ in range(20):
            assert same(next(plain), next(ahead))
            assert alike(plain.state_dict(), ahead.state_dict())
        middle = ahead.state_dict()
        following = [next(plain) for _ in range(5)]
        for _ in range(7):
            next(ahead)
        ahead.load_state_dict(middle)
        assert all(same(next(ahead), batch) for batch in following)
        assert ahead.redistribute([middle])
        assert plain.redistribute([middle])
        assert all(same(next(ahead), next(plain)) for _ in range(5))
    assert torch.get_num_threads() == threads


def test_what_goes_wrong_comes_with_its_batch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(text(1, 60))
    _, ahead = loaders([SourceSettings(path=str(tmp_path))])
    with ahead:
        next(ahead)
        assert ahead._made is not None
        ahead._made.result()  # so that it is a later one that goes wrong
        patcher: Any = ahead.loader.patcher
        patcher.byte_lm = None
        next(ahead)
        with pytest.raises(UserError, match="needs a byte LM"):
            next(ahead)


def test_a_run_that_reads_ahead_ends_as_one_that_does_not(
    tmp_path: Path, sources: list[SourceSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bytelatent.commands.train import main

    weights = []
    for name, ahead in (("plain", False), ("ahead", True)):
        monkeypatch.setattr(loop, "prefetches", lambda _, ahead=ahead: ahead)
        settings = [
            f"run={tmp_path / name}",
            "model={dim: 16, num_layers: 1, num_heads: 2, window: 8, multiple_of: 8}",
            f"data.train={sources[0].path}",
            *("data.context=20", "data.batch_bytes=40", "optimizer.warmup_steps=1", "checkpoint.every=2", "device=cpu"),
        ]
        main([*settings, "steps=4"])
        main([*settings, "steps=4"])  # nothing is left to do
        [last] = sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1:]
        weights.append((last / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
