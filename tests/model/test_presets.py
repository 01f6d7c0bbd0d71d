"""Named shapes."""

import pytest
import torch

from bytelatent.errors import UserError
from bytelatent.model import PRESETS, BLTSettings, ByteLMSettings, ModelSettings, build_model, preset
from bytelatent.model.flops import costs, flops_per_byte

# Layers of encoder, global transformer and decoder; k; widths; heads.
PAPER = {
    "blt-400m": ((1, 24, 7), 2, (768, 1280), (12, 10)),
    "blt-1b": ((1, 25, 9), 2, (1024, 2048), (16, 16)),
    "blt-2b": ((1, 26, 9), 3, (1024, 2560), (16, 20)),
    "blt-4b": ((1, 36, 9), 3, (1024, 3072), (16, 24)),
    "blt-8b": ((1, 32, 6), 4, (1280, 4096), (20, 32)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name: str) -> None:
    with torch.device("meta"):
        model = build_model(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_paper(name: str) -> None:
    settings = preset(name)
    assert isinstance(settings, BLTSettings)
    encoder, middle, decoder = settings.encoder, settings.global_transformer, settings.decoder
    assert PAPER[name] == (
        (encoder.num_layers, middle.num_layers, decoder.num_layers),
        settings.cross_attention.k,
        (encoder.dim, middle.dim),
        (encoder.num_heads, middle.num_heads),
    )
    assert (encoder.window, decoder.window, middle.window) == (512, 512, None)
    assert settings.ngram_hash is not None
    assert (settings.ngram_hash.sizes, settings.ngram_hash.num_functions) == ([3, 4, 5, 6, 7, 8], 1)


def test_hash_tables_of_the_released_1b() -> None:
    with torch.device("meta"):
        model = build_model(preset("blt-1b"))
    tables = model.get_parameter("encoder.ngram_hash.tables.weight")
    assert tables.numel() == 6 * 500_002 * 1024  # 3.07 billion


def test_entropy_model() -> None:
    settings = preset("entropy")
    assert isinstance(settings, ByteLMSettings)
    assert (settings.num_layers, settings.dim, settings.num_heads, settings.window) == (14, 768, 12, 512)


@pytest.mark.parametrize("scale", ["demo", "100m"])
def test_baselines_are_of_one_size(scale: str) -> None:
    """By the parameters that compute, and those with patches also by what a byte costs."""

    def named(kind: str) -> ModelSettings:
        return preset(f"demo-{kind}" if scale == "demo" else f"{kind}-{scale}")

    def size(settings: ModelSettings) -> int:
        return sum(part.num_parameters for part in costs(settings) if "tables" not in part.name)

    blt, others = named("blt"), [named(kind) for kind in ("flat", "megabyte", "spacebyte")]
    for other in others:
        assert type(other).model_validate(other.plain()) == other
        assert size(other) == pytest.approx(size(blt), rel=0.15)
    for other in others[1:]:
        assert flops_per_byte(other, 6, 4096) == pytest.approx(flops_per_byte(blt, 6, 4096), rel=0.15)


def test_settings_of_addition_need_its_absence() -> None:
    values = {**preset("demo-megabyte").plain(), "cross_attention": {"num_heads": 4}}
    with pytest.raises(UserError, match="joined_bytes is for a model without cross-attention"):
        BLTSettings.parse(values)


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no preset 'blt-1'; did you mean 'blt-1b'"):
        preset("blt-1")
