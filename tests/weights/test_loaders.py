"""Where and how precisely models are loaded: torch's own words, as well as names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.weights import load, load_byte_lm, load_byte_lm_and_context

LOADERS: dict[str, Callable[..., Any]] = {
    "BLT.from_pretrained": BLT.from_pretrained,
    "load": load,
    "load_byte_lm": load_byte_lm,
    "load_byte_lm_and_context": load_byte_lm_and_context,
}


def loaded(name: str, folder: Path, **how: Any) -> torch.nn.Module:
    found = LOADERS[name](folder, **how)
    found = found[0] if isinstance(found, tuple) else found
    return found.model if hasattr(found, "model") else found  # the network; a BLT's entropy model keeps float32


@pytest.fixture
def folder(blt: BLT, tmp_path: Path) -> Path:
    blt.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), ("auto", None)],
)
def test_names_and_torchs_own(
    name: str, device: str | torch.device, dtype: str | torch.dtype, precision: torch.dtype | None, folder: Path
) -> None:
    model = loaded(name, folder, device=device, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {precision or torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": torch.float16}, "dtype: 'torch.float16' is not known; use float32, bfloat16 or auto"),
        ({"dtype": "half"}, "dtype: 'half' is not known"),
        ({"device": "gpu"}, "device: 'gpu' is not known"),
        ({"device": torch.device("meta")}, "device: 'meta' is not known"),
        ({"device": "cuda"}, "device: 'cuda' cannot be used"),
        ({"device": torch.device("cuda", 1)}, "device: 'cuda:1' cannot be used"),
    ],
)
def test_others_are_refused_before_anything_is_read(
    name: str, how: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        LOADERS[name](tmp_path / "nowhere", **how)


@pytest.mark.parametrize("format", ["HF", "gguf", "", None, ["hf"], 7])
def test_a_format_that_is_not_known(format: Any, blt: BLT, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format: .* is unknown; use native, hf, meta") as caught:
        blt.save_pretrained(tmp_path / "a", format=format)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"patching": PatchSettings(mode="space")},
            "hf: the format knows the patching modes entropy, byte",
        ),
        ({"byte_lm": None}, "hf: patching mode 'entropy' needs the byte LM in the same folder"),
    ],
)
def test_a_model_that_cannot_be_exported(change: dict[str, Any], message: str, blt: BLT, tmp_path: Path) -> None:
    config = blt.config.model_copy(update={key: value for key, value in change.items() if key == "patching"})
    with pytest.raises(UserError, match=message):
        BLT(blt.model, config, change.get("byte_lm", blt.entropy_model)).save_pretrained(tmp_path / "a", format="hf")
    assert list(tmp_path.iterdir()) == []
