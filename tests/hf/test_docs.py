"""Each example of docs/transformers.md runs, one after another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent import BLT
from bytelatent.model import PRESETS
from bytelatent.weights import open_pretrained
from tests.model.tiny import tiny_blt_settings
from tests.test_docs import snippets

PAGE = "docs/transformers.md"


def test_examples(blt: BLT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "demo-blt", tiny_blt_settings(window=6))
    blt.save_pretrained(tmp_path / "runs" / "demo")
    names: dict[str, Any] = {}
    for snippet in snippets(PAGE, "python"):
        exec(compile(snippet, PAGE, "exec"), names)
    assert names["tokenizer"]("été").input_ids == [1, 199, 173, 120, 199, 173]
    assert {open_pretrained(folder).format for folder in ("tuned", "merged")} == {"bytelatent"}
    merged = BLT.from_pretrained("merged", device="cpu").logits("some text")
    torch.testing.assert_close(BLT.from_pretrained("merged-hf", device="cpu").logits("some text"), merged)
