"""Costs against torch's own counter and the real models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bytelatent.model import add_patches, build
from bytelatent.model.flops import costs, keys_seen
from bytelatent.model.settings import BLTSettings, ByteLMSettings, CrossAttentionSettings, StackSettings
from tests.model.tiny import stream_of, tiny_blt_settings


def counted_matrices(settings: BLTSettings | ByteLMSettings, size: int, patch_bytes: int, monkeypatch) -> int:
    """Operations that torch counts in one forward pass. Attention in blocks is cut out: torch counts masked keys, too.

    Cross-attention multiplies and adds elementwise, which torch does not count at all.
    """
    monkeypatch.setattr("bytelatent.model.block.attend", lambda q, k, v, mask: q)
    starts = torch.tensor([(i + 1) % patch_bytes == 0 for i in range(size)])
    stream = add_patches(stream_of([torch.arange(size)]), starts)
    assert stream.num_patches * patch_bytes == size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(settings)(stream)
    return counter.get_total_flops()


def looped_attention(settings: StackSettings, size: int) -> int:
    """4 * dim for each pair of a query and a key that it sees."""
    pairs = sum(1 for at in range(size) for i in range(at + 1) if settings.window is None or at - i < settings.window)
    return 4 * settings.dim * pairs * settings.num_layers


@pytest.mark.parametrize("window", [None, 5, 24, 50])
@pytest.mark.parametrize("all_layers", [True, False])
def test_blt(window: int | None, all_layers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    size, patch_bytes, k = 24, 4, 3
    cross = CrossAttentionSettings(k=k, num_heads=4, all_layers_encoder=all_layers, all_layers_decoder=all_layers)
    settings = tiny_blt_settings(window=window, cross_attention=cross)
    matrices = counted_matrices(settings, size, patch_bytes, monkeypatch)
    attention = looped_attention(settings.encoder, size) + looped_attention(settings.decoder, size)
    attention += looped_attention(settings.global_transformer, size // patch_bytes)
    # Each byte is scored and gathered by its patch's k queries, and reads k keys, 4 * dim each.
    num_cross = 2 + 2 if all_layers else 1 + 1
    attention += num_cross * size * k * 4 * settings.encoder.dim
    parts = costs(settings, patch_bytes=patch_bytes, context=size)
    assert sum(part.flops_per_byte for part in parts) * size == pytest.approx(matrices + attention, rel=1e-12)


@pytest.mark.parametrize("window", [None, 5])
def test_byte_lm(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ByteLMSettings(dim=16, num_layers=3, num_heads=4, num_kv_heads=2, window=window)
    matrices = counted_matrices(settings, 24, 4, monkeypatch)
    parts = costs(settings, context=24)
    total = sum(part.flops_per_byte for part in parts) * 24
    assert total == pytest.approx(matrices + looped_attention(settings, 24), rel=1e-12)


@pytest.mark.parametrize("hashed", [True, False])
def test_parameters(hashed: bool) -> None:
    settings = tiny_blt_settings() if hashed else tiny_blt_settings(ngram_hash=None)
    parts = costs(settings)
    assert sum(part.num_parameters for part in parts) == sum(p.numel() for p in build(settings).parameters())
    tables = [part for part in parts if part.name == "n-gram hash tables"]
    assert [(part.num_parameters, part.flops_per_byte) for part in tables] == ([(2 * 53 * 16, 0)] if hashed else [])
    byte_lm = ByteLMSettings(dim=16, num_layers=3, num_heads=4)
    assert sum(part.num_parameters for part in costs(byte_lm)) == sum(p.numel() for p in build(byte_lm).parameters())


@pytest.mark.parametrize(("window", "context"), [(None, 7), (3, 7), (7, 7), (9, 7), (1, 7)])
def test_keys_seen(window: int | None, context: int) -> None:
    settings = StackSettings(dim=2, num_layers=1, num_heads=1, window=window)
    assert keys_seen(settings, context) * context * 8 == pytest.approx(looped_attention(settings, context))
