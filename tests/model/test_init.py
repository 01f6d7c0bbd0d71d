"""Fresh weights."""

import pytest
import torch
from torch import nn

from bytelatent.model import build_model
from bytelatent.model.settings import NgramHashSettings, StackSettings
from tests.model.tiny import tiny_blt_settings

# Of a normal distribution cut at 3 standard deviations, the share of the uncut one's that is left.
CUT = 0.98658


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    local = StackSettings(dim=64, num_layers=2, num_heads=4, multiple_of=8)
    return build_model(
        tiny_blt_settings(
            encoder=local, decoder=local,
            global_transformer=StackSettings(dim=96, num_layers=2, num_heads=4, num_kv_heads=2, multiple_of=8),
            ngram_hash=NgramHashSettings(sizes=[3], vocab_size=500),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("encoder.embedding", 64),
        ("encoder.ngram_hash.tables", 64),
        ("encoder.stack.blocks.0.attention.query", 64),
        ("encoder.stack.blocks.1.feed_forward.gate", 64),
        ("encoder.stack.blocks.1.feed_forward.down", 176),  # its hidden width
        ("encoder.pooled_to_queries", 64),
        ("encoder.cross_attention.0.output", 64),
        ("global_transformer.projection", 128),
        ("global_transformer.stack.blocks.0.attention.key", 96),
        ("global_transformer.stack.blocks.0.feed_forward.down", 256),
        ("decoder.patch_to_keys", 96),
        ("decoder.output", 64),
    ],
)
def test_spread(model: nn.Module, name: str, width: int) -> None:
    weight = model.get_parameter(f"{name}.weight").detach()
    std = width**-0.5
    # The sampled spread of n values is within about std / sqrt(2 n) of the true one; five times that.
    assert abs(float(weight.std()) / (CUT * std) - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert abs(float(weight.mean())) < 5 * std / weight.numel() ** 0.5
    assert 2.5 * std < float(weight.abs().max()) <= 3 * std * (1 + 1e-6)


def test_norms_are_ones_and_nothing_is_left_out(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert "norm" in name
            assert (parameter == 1).all()
        else:
            assert float(parameter.detach().std()) < 0.2, name  # torch's own embeddings have std 1
    assert not any("bias" in name for name, _ in model.named_parameters())


def test_the_seed_decides() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_model(tiny_blt_settings()).state_dict()

    first, again, other = state(1), state(1), state(2)
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["decoder.output.weight"].equal(other["decoder.output.weight"])
