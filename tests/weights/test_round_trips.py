"""There and back: a model goes through another format and comes back bit for bit, or is refused by name."""

import filecmp
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, ByteLMSettings
from bytelatent.model.settings import StackSettings
from bytelatent.patching import MODES, Calibration, PatchSettings
from bytelatent.weights import Config, Origin, convert, load, open_pretrained, save
from bytelatent.weights.native import WeightsFormat
from tests.model.tiny import blt_settings, byte_lm_settings, make, tiny_blt_settings, tiny_byte_lm
from tests.weights.test_convert import REFUSED

EXAMPLES = settings(max_examples=25, deadline=None)
ORIGIN = Origin(
    licence="mit",
    training_text=["data/*.jsonl", "more"],
    training_bytes=12_345,
    validation_text=["held-out"],
    bits_per_byte=1.25,
)
MEASURED = Calibration(threshold=5.12, wanted_patch_bytes=4, mean_patch_bytes=4.1, window=6, data="x", data_bytes=10)
PATCHINGS = [
    PatchSettings(threshold=5.12),
    PatchSettings(threshold=5.12, max_patch_length=3),
    PatchSettings(threshold=0.01, monotonicity=True),
    PatchSettings(threshold=5.1, threshold_add=0.01),
    PatchSettings(mode="space", max_patch_length=5),
    PatchSettings(mode="static", patch_size=4),
    PatchSettings(mode="bpe", tokenizer="tokenizer.json"),
    *(PatchSettings(mode=mode) for mode, its in MODES.items() if not its.required),
]
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IDS = torch.tensor([[1, *(byte + 4 for byte in b"there and back again")]])


@dataclass(frozen=True)
class Sample:
    model: BLTSettings
    patching: PatchSettings
    byte_lm: ByteLMSettings | None
    precision: torch.dtype
    context: int

    def write(self, folder: Path) -> BLT:
        """Write it in our format, with all that a configuration may hold."""
        byte_lm = make(self.byte_lm, seed=2).to(torch.float16) if self.byte_lm is not None else None
        config = Config(
            model=self.model, context=self.context, patching=self.patching, calibration=MEASURED, origin=ORIGIN
        )
        blt = BLT(make(self.model, seed=1).to(self.precision), config, byte_lm)
        blt.save_pretrained(folder)
        return blt


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any, half of them with parts as alike as the other formats want them."""
    alike = draw(st.booleans())
    model = draw(blt_settings(crosses=alike or None, options=False))
    if alike:
        stack = {**model.encoder.plain(), "num_kv_heads": None}
        cross = model.cross_attention.model_copy(update={"num_heads": model.encoder.num_heads, "num_kv_heads": None})
        middle = model.global_transformer
        shared = {key: stack[key] for key in ("ffn_dim_multiplier", "multiple_of", "rope_theta", "norm_eps")}
        update = {
            "encoder": StackSettings(**stack),
            "global_transformer": StackSettings(**{**middle.plain(), **shared}),
            "decoder": StackSettings(**{**stack, "num_layers": model.decoder.num_layers}),
            "cross_attention": cross,
        }
        model = BLTSettings(**{**dict(model), **update})
    return Sample(
        model=model,
        patching=draw(st.sampled_from(PATCHINGS)),
        byte_lm=draw(st.none() | byte_lm_settings(options=False)),
        precision=draw(st.sampled_from(PRECISIONS)),
        context=draw(st.integers(1, 10_000)),
    )


def has_room(format: str, sample: Sample) -> bool:
    """As documented in docs/weights.md."""
    model, patching, cross = sample.model, sample.patching, sample.model.cross_attention
    parts = (model.encoder, model.decoder)
    if cross is None or model.encoder.window != model.decoder.window:
        return False
    if format == "hf":
        plain = patching.mode in ("entropy", "byte") and not patching.monotonicity and patching.threshold_add is None
        heads = {(part.num_heads, part.kv_heads) for part in (*parts, cross)}
        pools_once = model.encoder.num_layers == 1 or not cross.all_layers_encoder
        return plain and len(heads) == 1 and pools_once and (patching.mode == "byte" or sample.byte_lm is not None)
    shared = {
        (part.multiple_of, part.ffn_dim_multiplier, part.rope_theta, part.norm_eps)
        for part in (*parts, model.global_transformer)
    }
    plain_heads = all(part.kv_heads == part.num_heads for part in (*parts, cross))
    return (patching.mode, "meta") not in REFUSED and len(shared) == 1 and plain_heads


@contextmanager
def folders() -> Iterator[tuple[Path, Path, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        first, there, back = (Path(folder) / name for name in ("first", "there", "back"))
        yield first, there, back


def without_conversion(config: Config) -> Config:
    return config.model_copy(update={"origin": config.origin.model_copy(update={"converted_from": None})})


def published(**changes: object) -> Sample:
    """Such as every format has room for."""
    model = tiny_blt_settings(
        window=6, cross_attention={"k": 2, "num_heads": 2}, ngram_hash={"sizes": [3, 5], "vocab_size": 11}
    )
    model = model.model_copy(
        update={"global_transformer": StackSettings(dim=24, num_layers=2, num_heads=3, multiple_of=8)}
    )
    values = {
        "patching": PATCHINGS[0],
        "byte_lm": tiny_byte_lm(window=6).settings,
        "precision": torch.float32,
        "context": 64,
    }
    return Sample(model=model, **values | changes)  # type: ignore[arg-type]


def with_other_window() -> Sample:
    sample = published()
    decoder = sample.model.decoder.model_copy(update={"window": 7})
    return replace(sample, model=sample.model.model_copy(update={"decoder": decoder}))


@pytest.mark.parametrize("format", ["hf", "meta"])
@EXAMPLES
@given(sample=samples())
@example(sample=published())
@example(sample=published(precision=torch.bfloat16, patching=PATCHINGS[2], byte_lm=None))
@example(sample=published(patching=PATCHINGS[1]))
@example(sample=with_other_window())
def test_there_and_back(format: str, sample: Sample) -> None:
    with folders() as (first, there, back):
        ours = sample.write(first)
        if not has_room(format, sample):
            with pytest.raises(UserError, match=f"^{format}: ") as caught:
                convert(open_pretrained(first), there, format)
            assert "\n" not in str(caught.value)
            assert not there.exists()
            return
        convert(open_pretrained(first), there, format)
        convert(open_pretrained(there), back, "native")
        for file in ("model.safetensors", *(["byte_lm/model.safetensors"] if sample.byte_lm else [])):
            assert filecmp.cmp(first / file, back / file, shallow=False), file
        assert (back / "byte_lm").is_dir() == (sample.byte_lm is not None)
        found = open_pretrained(back)
        assert without_conversion(found.config) == ours.config
        assert found.config.origin.converted_from == "first (bytelatent)"
        if found.byte_lm is not None:
            assert found.byte_lm.config.model == sample.byte_lm
            assert found.byte_lm.config.context == sample.context


@pytest.mark.parametrize("format", ["hf", "meta"])
@EXAMPLES
@given(sample=samples().filter(lambda s: has_room("hf", s) or has_room("meta", s)))
@example(sample=published(precision=torch.float64))
@example(sample=published(patching=PATCHINGS[1]))
def test_the_other_format_alone_describes_the_whole_model(format: str, sample: Sample) -> None:
    """Without the sidecar: bit for bit the same logits and patches."""
    if not has_room(format, sample):
        return
    with folders() as (first, there, _):
        sample.write(first)
        convert(open_pretrained(first), there, format)
        sidecars = list(there.rglob("bytelatent*.json"))
        assert len(sidecars) == (2 if sample.byte_lm else 1)
        for file in sidecars:
            file.unlink()
        ours, theirs = (BLT.from_pretrained(folder, device="cpu") for folder in (first, there))
        assert theirs.patching == sample.patching
        lengths = torch.tensor([[1, 5, 1, 3, 11]])
        assert theirs.logits(IDS, lengths).equal(ours.logits(IDS, lengths))
        if not sample.patching.needs_entropies or sample.byte_lm is not None:
            assert theirs.logits(IDS).equal(ours.logits(IDS))
        assert (theirs.entropy_model is None) == (ours.entropy_model is None)
        if ours.entropy_model is not None and theirs.entropy_model is not None:
            assert theirs.entropy_model.settings.window == ours.entropy_model.settings.window


@EXAMPLES
@given(shape=byte_lm_settings(options=False), precision=st.sampled_from(PRECISIONS))
def test_a_byte_lm_alone(shape: ByteLMSettings, precision: torch.dtype) -> None:
    with folders() as (first, there, back):
        first.mkdir()
        save(first, make(shape).to(precision), Config(model=shape, context=77, origin=ORIGIN))
        with pytest.raises(UserError, match=r"^hf: transformers has no class for a byte LM alone"):
            convert(open_pretrained(first), there, "hf")
        convert(open_pretrained(first), there, "meta")
        convert(open_pretrained(there), back, "native")
        assert filecmp.cmp(first / "model.safetensors", back / "model.safetensors", shallow=False)
        assert without_conversion(open_pretrained(back).config) == open_pretrained(first).config
        for file in there.rglob("bytelatent.json"):
            file.unlink()
        found = load(there).config.model
        assert isinstance(found, ByteLMSettings)
        assert found.model_copy(update={"num_kv_heads": None}) == shape.model_copy(update={"num_kv_heads": None})
        assert found.kv_heads == shape.kv_heads


def test_precisions_may_differ_from_tensor_to_tensor(tmp_path: Path) -> None:
    """They are kept on disk; the model computes in the widest."""
    sample = published()
    blt = sample.write(tmp_path / "first")
    blt.model.decoder.to(torch.bfloat16)
    blt.save_pretrained(tmp_path / "mixed")
    convert(open_pretrained(tmp_path / "mixed"), tmp_path / "there", "hf")
    convert(open_pretrained(tmp_path / "there"), tmp_path / "back", "native")
    weights = "model.safetensors"
    assert filecmp.cmp(tmp_path / "mixed" / weights, tmp_path / "back" / weights, shallow=False)
    assert "bfloat16 and float32" in open_pretrained(tmp_path / "mixed").in_a_line()
    found = BLT.from_pretrained(tmp_path / "back", device="cpu", dtype="auto")
    assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}
    assert found.logits(IDS).isfinite().all()


def test_shards_come_back_as_one_and_the_other_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published().write(tmp_path / "first")
    whole = open_pretrained(tmp_path / "first")
    monkeypatch.setattr(WeightsFormat, "shard_bytes", 9_000)
    for format in ("native", "hf"):
        convert(whole, tmp_path / format, format)
        assert len(list((tmp_path / format).glob("model-*-of-*.safetensors"))) > 2
        assert not (tmp_path / format / "model.safetensors").exists()
    convert(whole, tmp_path / "meta", "meta")  # published code reads one file
    assert (tmp_path / "meta" / "model.safetensors").is_file()
    monkeypatch.undo()
    for format in ("native", "hf", "meta"):
        convert(open_pretrained(tmp_path / format), tmp_path / f"{format}-back", "native")
        weights = "model.safetensors"
        assert filecmp.cmp(tmp_path / "first" / weights, tmp_path / f"{format}-back" / weights, shallow=False)
