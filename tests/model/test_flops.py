"""Costs against torch's own counter on the meta device, loops over pairs, and the real models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bytelatent.model import add_patches, build_model, flops, preset
from bytelatent.model.flops import PartCost, costs, flops_per_byte, keys_seen, training_flops
from bytelatent.model.settings import ByteLMSettings, CrossAttentionSettings, ModelSettings, StackSettings
from tests.model.tiny import stream_of, tiny_blt_settings

# Shapes: T ids in the stream, H heads, J key/value heads, E head size


def counted(settings: ModelSettings, size: int, patch_bytes: int) -> tuple[int, int]:
    """Operations that torch counts in a forward pass over one document, and in its backward pass."""
    starts = torch.tensor([(i + 1) % patch_bytes == 0 for i in range(size)])
    stream = add_patches(stream_of([torch.arange(size) % 256]), starts)
    assert stream.num_patches * patch_bytes == size
    with torch.device("meta"):
        model = build_model(settings)
        for part in model.modules():
            if isinstance(part, nn.EmbeddingBag):  # the gradient's shape depends on the text; there are no products
                part.requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        loss = F.cross_entropy(model(stream.to("meta")), torch.zeros(size, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


class SumsInPlaceOfAttention:
    """No products; keys and values get gradients as from attention."""

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        return q_THE + (k_TJE + v_TJE).repeat_interleave(q_THE.shape[1] // k_TJE.shape[1], dim=1)


def looped_attention(settings: StackSettings, size: int) -> int:
    """4 * dim for each pair of a query and a key that it sees."""
    pairs = sum(1 for at in range(size) for i in range(at + 1) if settings.window is None or at - i < settings.window)
    return 4 * settings.dim * pairs * settings.num_layers


def of_attention(parts: list[PartCost], cross: bool = True) -> float:
    return sum(part.of_attention for part in parts if cross or not part.name.endswith("cross-attention"))


def shallow(name: str, **cross: Any) -> ModelSettings:
    """A preset in its own widths with few layers."""
    settings = preset(name)
    if isinstance(settings, StackSettings):
        return settings.model_copy(update={"num_layers": 2})
    depths = {"encoder": 2, "global_transformer": 3, "decoder": 2}
    update: dict[str, Any] = {
        part: getattr(settings, part).model_copy(update={"num_layers": depth}) for part, depth in depths.items()
    }
    if settings.cross_attention is not None:
        update["cross_attention"] = settings.cross_attention.model_copy(update=cross)
    return settings.model_copy(update=update)


GROUPED = ByteLMSettings(dim=64, num_layers=2, num_heads=4, num_kv_heads=2)
SHAPES = {
    "entropy": (shallow("entropy"), 2048, 4),
    "grouped heads, no window": (GROUPED, 512, 4),
    "demo-blt": (preset("demo-blt"), 1024, 4),
    "blt-1b": (shallow("blt-1b"), 2048, 4),
    "blt-1b, all layers": (shallow("blt-1b", all_layers_encoder=True), 2048, 8),
    "blt-1b, one decoder layer, k 3": (shallow("blt-1b", all_layers_decoder=False, k=3), 1024, 4),
    "blt-8b": (shallow("blt-8b"), 2048, 8),
    "without hash tables": (shallow("blt-1b").model_copy(update={"ngram_hash": None}), 1024, 4),
    "flat": (shallow("flat-100m"), 512, 4),
    "token LM": (shallow("token-lm-100m"), 512, 1),
    "megabyte": (shallow("megabyte-100m"), 1536, 6),
    "spacebyte": (shallow("spacebyte-100m"), 1536, 6),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_in_training(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but attention, exactly: torch would count masked pairs, too, and cross-attention's sums not at all."""
    settings, size, patch_bytes = SHAPES[shape]
    monkeypatch.setattr("bytelatent.model.block.build_mask", lambda *_: SumsInPlaceOfAttention())
    forward, backward = counted(settings, size, patch_bytes)
    attention = of_attention(costs(settings, patch_bytes, size))
    assert flops_per_byte(settings, patch_bytes, size) - attention == pytest.approx(forward / size, rel=1e-12)
    assert training_flops(settings, patch_bytes, size) - 3 * attention == pytest.approx(
        (forward + backward) / size, rel=1e-12
    )


def test_token_lm_per_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch counts them per token, and so many bytes share them; the output layer is among them."""
    settings, size, token_bytes = preset("demo-token-lm"), 512, 4
    monkeypatch.setattr("bytelatent.model.block.build_mask", lambda *_: SumsInPlaceOfAttention())
    forward, _ = counted(settings, size, token_bytes)
    attention = of_attention(costs(settings, token_bytes, size * token_bytes))
    found = flops_per_byte(settings, token_bytes, size * token_bytes) - attention
    assert found == pytest.approx(forward / (size * token_bytes), rel=1e-12)
    assert attention == pytest.approx(looped_attention(settings, size) / (size * token_bytes), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_training_with_attention_as_it_is_multiplied(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every pair that is multiplied on a CPU, seen or masked: all of them, or two blocks of a window."""
    settings, size, patch_bytes = SHAPES[shape]
    forward, backward = counted(settings, size, patch_bytes)

    def multiplied(stack: StackSettings, context: float) -> float:
        return context if stack.window is None or context <= 2 * stack.window else 2 * stack.window

    monkeypatch.setattr(flops, "keys_seen", multiplied)
    parts = costs(settings, patch_bytes, size)
    uncounted = of_attention(parts) - of_attention(parts, cross=False)  # cross-attention's, not in matrix products
    assert flops_per_byte(settings, patch_bytes, size) - uncounted == pytest.approx(forward / size, rel=0.01)
    assert training_flops(settings, patch_bytes, size) - 3 * uncounted == pytest.approx(
        (forward + backward) / size, rel=0.01
    )


def test_a_token_costs_the_same_of_however_many_bytes_it_is() -> None:
    settings, size, *_ = SHAPES["token LM"]
    assert 5 * flops_per_byte(settings, 5, 5 * size) == pytest.approx(flops_per_byte(settings, 1, size), rel=1e-12)


@pytest.mark.parametrize("window", [None, 5, 24, 50])
@pytest.mark.parametrize("all_layers", [True, False])
def test_attention_of_a_blt(window: int | None, all_layers: bool) -> None:
    size, patch_bytes, k = 24, 4, 3
    cross = CrossAttentionSettings(k=k, num_heads=4, all_layers_encoder=all_layers, all_layers_decoder=all_layers)
    settings = tiny_blt_settings(window=window, cross_attention=cross)
    attention = looped_attention(settings.encoder, size) + looped_attention(settings.decoder, size)
    attention += looped_attention(settings.global_transformer, size // patch_bytes)
    # Each byte is scored and gathered by its patch's k queries, and reads k keys, 4 * dim each.
    num_cross = 2 + 2 if all_layers else 1 + 1
    attention += num_cross * size * k * 4 * settings.encoder.dim
    parts = costs(settings, patch_bytes=patch_bytes, context=size)
    assert of_attention(parts) * size == pytest.approx(attention, rel=1e-12)
    assert all(part.of_attention <= part.flops_per_byte for part in parts)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_a_byte_lm(window: int | None) -> None:
    settings = ByteLMSettings(dim=16, num_layers=3, num_heads=4, num_kv_heads=2, window=window)
    assert of_attention(costs(settings, context=24)) * 24 == pytest.approx(looped_attention(settings, 24), rel=1e-12)


@pytest.mark.parametrize("hashed", [True, False])
def test_parameters(hashed: bool) -> None:
    settings = tiny_blt_settings() if hashed else tiny_blt_settings(ngram_hash=None)
    parts = costs(settings)
    assert sum(part.num_parameters for part in parts) == sum(p.numel() for p in build_model(settings).parameters())
    tables = [part for part in parts if part.name == "n-gram hash tables"]
    assert [(part.num_parameters, part.flops_per_byte) for part in tables] == ([(2 * 53 * 16, 0)] if hashed else [])
    byte_lm = ByteLMSettings(dim=16, num_layers=3, num_heads=4)
    assert sum(part.num_parameters for part in costs(byte_lm)) == sum(
        p.numel() for p in build_model(byte_lm).parameters()
    )


@pytest.mark.parametrize(("window", "context"), [(None, 7), (3, 7), (7, 7), (9, 7), (1, 7)])
def test_keys_seen(window: int | None, context: int) -> None:
    settings = StackSettings(dim=2, num_layers=1, num_heads=1, window=window)
    assert keys_seen(settings, context) * context * 8 == pytest.approx(looped_attention(settings, context))
