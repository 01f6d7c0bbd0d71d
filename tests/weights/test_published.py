"""The published outputs, from Meta's two formats, by `from_pretrained` alone: logits, entropies, patches."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.model import ByteLM, pack_rows
from bytelatent.patching import PatchSettings
from bytelatent.weights import open_pretrained
from tests.weights.published import Format, write_published

FORMATS: list[Format] = ["hub", "older"]
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}


def entropies_of(byte_lm: ByteLM | None, ids: Tensor) -> Tensor:
    assert byte_lm is not None
    return byte_lm.entropies(pack_rows(list(ids.long()))).view(ids.shape)


def published_patches(entropies: Tensor, threshold: float) -> Tensor:
    """Lengths in the plain entropy mode, from [N]: position i+1 starts a patch where H_i > threshold, i >= 1."""
    starts = [0, 1, *(i + 1 for i in range(1, len(entropies)) if entropies[i] > threshold)]
    ends = [*starts[1:], len(entropies) + 1]
    return torch.tensor([[end - start for start, end in zip(starts, ends, strict=True)]])


@pytest.mark.parametrize("entropy_format", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("name", "entropy_place"),
    [
        ("blt_k2", "beside/blt-entropy"),
        ("blt_k2", "beside/entropy_model"),
        ("blt_k4_proj", "blt/entropy_model"),
        ("blt_k4_proj", "blt/blt-entropy"),
    ],
)
def test_logits_entropies_and_patches(
    name: str, entropy_place: str, format: Format, entropy_format: Format, goldens: Path, tmp_path: Path
) -> None:
    place = "beside/blt-1b" if entropy_place.startswith("beside") else "blt"
    write_published(goldens / name, tmp_path / place, format)
    write_published(goldens / "entropy", tmp_path / entropy_place, entropy_format)
    io, of_entropies = (load_file(goldens / golden / "io.safetensors") for golden in (name, "entropy"))
    found = BLT.from_pretrained(tmp_path / place, device="cpu")
    assert found.patching == PatchSettings(threshold=1.335442066192627)
    torch.testing.assert_close(found.logits(io["tokens"].long(), io["patch_lengths"].long()), io["logits"], **TOLERANCE)
    torch.testing.assert_close(
        entropies_of(found.entropy_model, of_entropies["tokens"]), of_entropies["entropies"], **TOLERANCE
    )


@pytest.mark.parametrize("format", FORMATS)
def test_patches_end_to_end(format: Format, goldens: Path, tmp_path: Path) -> None:
    """The byte LM that was found decides about patches, at a threshold between its entropies."""
    folder = write_published(goldens / "blt_k2", tmp_path / "blt", format)
    write_published(goldens / "entropy", tmp_path / "blt-entropy", format)
    io = load_file(goldens / "entropy" / "io.safetensors")
    ordered = io["entropies"].flatten().sort().values
    middle = ordered[len(ordered) // 4 : -len(ordered) // 4]
    widest = int(middle.diff().argmax())
    threshold = float(middle[widest] + middle[widest + 1]) / 2
    file, keys = ("params.json", "data") if format == "older" else ("train_args.json", "data")
    values = json.loads((folder / file).read_text())
    values[keys]["patcher_args"]["threshold"] = threshold
    (folder / file).write_text(json.dumps(values))
    found = BLT.from_pretrained(folder, device="cpu")
    for row, entropies in zip(io["tokens"].long(), io["entropies"], strict=True):
        lengths = published_patches(entropies, threshold)
        assert 10 < lengths.shape[1] < len(row)
        torch.testing.assert_close(found.logits(row[None]), found.logits(row[None], lengths), atol=2e-5, rtol=0)


def test_the_line_about_what_was_found(goldens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_published(goldens / "blt_k2", tmp_path / "blt", "older")
    write_published(goldens / "entropy", tmp_path / "entropy_model", "older")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: fair-research\n---\n# BLT\n")
    with caplog.at_level("INFO", logger="bytelatent"):
        BLT.from_pretrained(folder, device="cpu")
    [line] = caplog.messages
    size = sum(tensor.numel() for tensor in load_file(goldens / "entropy" / "model.safetensors").values())
    for part in (
        f"{folder}: Meta's older format",
        "float32",
        "threshold 1.335 nats",
        f"byte LM of {size / 1000:.3g} thousand parameters",
        "licence fair-research",
    ):
        assert part in line


def test_the_byte_lm_is_searched_only_if_it_is_needed(goldens: Path, tmp_path: Path) -> None:
    folder = write_published(goldens / "blt_k2", tmp_path / "blt")
    (tmp_path / "blt-entropy").mkdir()
    (tmp_path / "blt-entropy" / "params.json").write_text("[]")  # what would be refused
    with pytest.raises(UserError, match=r"blt-entropy.params.json' holds no JSON object"):
        open_pretrained(folder)
    values = json.loads((folder / "train_args.json").read_text())
    values["data"]["patcher_args"] = {"patching_mode": "space"}
    (folder / "train_args.json").write_text(json.dumps(values))
    assert open_pretrained(folder).byte_lm is None


def test_a_byte_lm_that_is_named(goldens: Path, tmp_path: Path) -> None:
    folder = write_published(goldens / "blt_k2", tmp_path / "blt", "older")
    entropy = write_published(goldens / "entropy", tmp_path / "somewhere" / "else", "older")
    assert BLT.from_pretrained(folder, device="cpu").entropy_model is None
    assert "no byte LM" in open_pretrained(folder).in_a_line()
    whole = BLT.from_pretrained(folder, entropy_model=entropy, device="cpu")
    assert whole.entropy_model is not None
    whole.save_pretrained(tmp_path / "whole")
    of_whole = open_pretrained(folder, entropy_model=tmp_path / "whole").byte_lm  # a BLT lends its own
    assert of_whole is not None
    assert of_whole.config.model == whole.entropy_model.settings
    with pytest.raises(UserError, match=r"entropy_model: '.*' holds a BLT without a byte LM"):
        open_pretrained(folder, entropy_model=folder)
    with pytest.raises(UserError, match="is a byte LM itself and needs no other"):
        open_pretrained(entropy, entropy_model=folder)


def test_older_weights_as_safetensors_or_bare(goldens: Path, tmp_path: Path) -> None:
    """`consolidated.safetensors`, and a pickle without the key `model`."""
    io = load_file(goldens / "blt_k2" / "io.safetensors")
    tensors = load_file(goldens / "blt_k2" / "model.safetensors")
    for name in ("bare", "safe"):
        folder = write_published(goldens / "blt_k2", tmp_path / name, "older")
        (folder / "consolidated.pth").unlink()
        if name == "bare":
            torch.save(tensors, folder / "consolidated.pth")
        else:
            save_file(tensors, folder / "consolidated.safetensors")
        found = BLT.from_pretrained(folder, device="cpu")
        logits = found.logits(io["tokens"].long(), io["patch_lengths"].long())
        torch.testing.assert_close(logits, io["logits"], **TOLERANCE)


def test_a_link_to_a_folder(goldens: Path, tmp_path: Path) -> None:
    write_published(goldens / "blt_k2", tmp_path / "real" / "blt")
    write_published(goldens / "entropy", tmp_path / "real" / "blt-entropy")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert open_pretrained(tmp_path / "link" / "blt").byte_lm is not None
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError, match=r"circle' (is not a folder|cannot be read)"):
        open_pretrained(tmp_path / "circle")
    shutil.rmtree(tmp_path / "real")
    with pytest.raises(UserError, match="is not a folder"):
        open_pretrained(tmp_path / "link")
