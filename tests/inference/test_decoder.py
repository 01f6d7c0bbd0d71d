"""Incremental decoding against the plain forward pass."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.inference import decoder as decode
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.step import PrefillDecoder
from bytelatent.model import ByteLM, add_patches, attention, lines_as_documents, pack_rows
from bytelatent.model.attention import Mask
from bytelatent.model.settings import CrossAttentionSettings, StackSettings
from bytelatent.patching import MODES, PatchSettings, next_starts
from tests.model.tiny import blt_settings, byte_lm_settings, make, random_ids, random_lines, tiny_blt, tiny_byte_lm

PATCHINGS = st.sampled_from(
    [
        PatchSettings(threshold=5.12),
        PatchSettings(threshold=5.3, max_patch_length=3),
        PatchSettings(threshold=0.01, monotonicity=True),
        PatchSettings(threshold=5.1, threshold_add=0.0, max_patch_length=7),
        PatchSettings(threshold=5.1, reset_at_newline=True),
        PatchSettings(mode="space", max_patch_length=2),
        PatchSettings(mode="static", patch_size=3),
        *(PatchSettings(mode=mode) for mode, its in MODES.items() if not its.required),
    ]
)


def full_logits(decoder: Decoder, rows: list[Tensor]) -> list[Tensor]:
    """Of whole rows, by the models' own forward passes."""
    stream = pack_rows(rows)
    with torch.no_grad():
        if isinstance(decoder.model, ByteLM):
            logits = decoder.model(stream)
        else:
            assert decoder.patching is not None
            read = lines_as_documents(stream) if decoder.patching.reset_at_newline else stream
            found = decoder.byte_lm.entropies(read) if decoder.byte_lm is not None else None
            starts = next_starts(stream.ids, found, stream.position, decoder.patching)
            logits = decoder.model(add_patches(stream, starts, history=stream.position))
    return list(logits.split([len(row) for row in rows]))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@given(
    settings=blt_settings(),
    byte_lm=byte_lm_settings(),
    patching=PATCHINGS,
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    data=st.data(),
)
def test_logits_equal_the_full_forward(
    settings: Any, byte_lm: Any, patching: PatchSettings, seed: int, sizes: list[int], data: st.DataObject
) -> None:
    """In float64: some of these models, a few numbers wide, are so steep that float32 would round by more than 1e-4."""
    decoder = Decoder(make(settings, seed).double(), patching, make(byte_lm, seed).double())
    check(decoder, sizes, seed, data)


@given(settings=byte_lm_settings(), seed=st.integers(0, 1000), data=st.data())
def test_logits_of_a_byte_lm(settings: Any, seed: int, data: st.DataObject) -> None:
    check(Decoder(make(settings, seed), None, None), [30, 3], seed, data)


def check(decoder: Decoder, sizes: list[int], seed: int, data: st.DataObject) -> None:
    """Prefill, then steps of a few ids for some of the rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.cat([torch.tensor([1]), random_lines(generator, size + 30)]) for size in sizes]
    expected = full_logits(decoder, rows)
    state, logits = decoder.prefill([row[:size] for row, size in zip(rows, sizes, strict=True)])
    for found, wanted, size in zip(logits.split(sizes), expected, sizes, strict=True):
        assert_close(found, wanted[:size])
    read = list(sizes)
    for _ in range(6):
        counts = [data.draw(st.integers(0, 4)) for _ in rows]
        if not any(counts):
            continue
        which = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)])
        ids = torch.cat([rows[row][read[row] : read[row] + count] for row, count in enumerate(counts)])
        found = decoder.extend(state, which, ids).split(counts)
        for row, count in enumerate(counts):
            assert_close(found[row], expected[row][read[row] : read[row] + count])
            read[row] += count


@pytest.mark.parametrize(
    "patching",
    [PatchSettings(threshold=5.12, reset_at_newline=True), PatchSettings(mode="space", max_patch_length=5)],
)
@settings_of_hypothesis(max_examples=5)
@given(seed=st.integers(0, 1000), data=st.data())
def test_the_way_a_gpu_reads_prompts(patching: PatchSettings, seed: int, data: st.DataObject) -> None:
    """With joined products, padding, and the kernels' plain forms."""
    shape = StackSettings(dim=32, num_layers=2, num_heads=2, multiple_of=8, window=7)
    middle = StackSettings(dim=48, num_layers=2, num_heads=3, multiple_of=8)
    every = CrossAttentionSettings(k=2, num_heads=2, all_layers_encoder=True)
    model = tiny_blt(seed, encoder=shape, decoder=shape, global_transformer=middle, cross_attention=every)
    decoder = PrefillDecoder(model, patching, tiny_byte_lm(seed, dim=32, window=6))
    check(decoder, [30, 1, 140], seed, data)
    lm = PrefillDecoder(tiny_byte_lm(seed, dim=32, window=6), None, None)
    check(lm, [30, 1, 140], seed, data)


def test_prompts_on_a_cpu_have_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several together cost what they cost one by one."""
    windows: list[int | None] = []

    def build_mask(document: Tensor, window: int | None) -> Mask:
        windows.append(window)
        return attention.build_mask(document, window)

    monkeypatch.setattr(decode, "build_mask", build_mask)
    decoder = Decoder(tiny_blt(window=6), PatchSettings(threshold=5.12), tiny_byte_lm(window=6))
    decoder.prefill([random_ids(torch.Generator(), size) for size in (30, 1, 50)])
    assert windows == [6, 6, 6]  # byte LM, encoder and decoder, but not the global transformer


@pytest.mark.parametrize("size", [1, 3, 16])
def test_new_ids_of_any_number(size: int) -> None:
    """With patches that close among them, at many positions; states are not shared between prompts."""
    decoder = Decoder(tiny_blt(window=6), PatchSettings(threshold=5.12), tiny_byte_lm(window=6))
    row = torch.cat([torch.tensor([1]), random_ids(torch.Generator().manual_seed(0), 65)])
    [expected] = full_logits(decoder, [row])
    state, _ = decoder.prefill([row[:5]])
    for at in range(5, 65 - size, size):
        found = decoder.extend(state, torch.zeros(size, dtype=torch.long), row[at : at + size])
        assert_close(found, expected[at : at + size])


@pytest.mark.parametrize("prompt", [3, 700])
def test_long_patches_and_long_texts(prompt: int) -> None:
    """Beyond every table's first size: one patch of all bytes, then many patches."""
    row = torch.cat([torch.tensor([1]), random_ids(torch.Generator().manual_seed(1), 1000)])
    for patching in (PatchSettings(mode="static", patch_size=800), PatchSettings(mode="byte")):
        decoder = Decoder(tiny_blt(), patching, None)
        [expected] = full_logits(decoder, [row])
        state, _ = decoder.prefill([row[:prompt]])
        found = [
            decoder.extend(state, torch.zeros(8, dtype=torch.long), row[at : at + 8]) for at in range(prompt, 990, 8)
        ]
        assert_close(torch.cat(found), expected[prompt : prompt + 8 * len(found)])


def test_rows_move_between_states() -> None:
    decoder = Decoder(tiny_blt(window=6), PatchSettings(threshold=5.12), tiny_byte_lm(window=6))
    generator = torch.Generator().manual_seed(2)
    rows = [torch.cat([torch.tensor([1]), random_ids(generator, 400)]) for _ in range(3)]
    expected = full_logits(decoder, rows)
    slots = decoder.empty(4)
    for row, (slot, size) in enumerate([(2, 5), (0, 300), (3, 40)]):
        state, _ = decoder.prefill([rows[row][:size]])
        slots.put([slot], state, [0])
        rows[row] = rows[row][size:]
        expected[row] = expected[row][size:]
    where = torch.tensor([2, 0, 3])
    for at in range(20):
        found = decoder.extend(slots, where, torch.stack([row[at] for row in rows]))
        assert_close(found, torch.stack([logits[at] for logits in expected]))
