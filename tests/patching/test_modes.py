import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from bytelatent.commands.patch import PatchingModes, mode_names
from bytelatent.data import Patcher, patches_of
from bytelatent.errors import UserError
from bytelatent.inference.step import patching as device_patching
from bytelatent.inference.step.patching import KERNEL_DECISIONS, kernel_decision
from bytelatent.patching import MODES, PatchSettings, PatchState, next_starts, patch_lengths, step
from bytelatent.patching.modes import ModeName
from bytelatent.weights import Config, save
from tests.model.tiny import tiny_byte_lm
from tests.patching import slow
from tests.patching.conftest import PATCHINGS
from tests.patching.streams import Document, documents, packed, tensors


def batch(document: Document, patching: PatchSettings) -> list[bool]:
    ids, entropies, position = tensors(document)
    return next_starts(ids, entropies if patching.needs_entropies else None, position, patching).tolist()


@given(documents)
def test_batch_equals_the_slow_mode(patching: PatchSettings, document: Document) -> None:
    assert batch(document, patching) == slow.starts(*document, patching)[1:]


@given(st.lists(documents, min_size=1, max_size=3))
def test_step_equals_batch(patching: PatchSettings, rows: list[Document]) -> None:
    num_ids = min(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids[:num_ids] for ids, _ in rows])
    entropies = torch.tensor([entropies[:num_ids] for _, entropies in rows]) if patching.needs_entropies else None
    position = torch.arange(num_ids).expand(ids.shape)
    state, decided = PatchState.empty(len(rows)), []
    for index in range(num_ids):
        state, starts = step(state, ids[:, index], None if entropies is None else entropies[:, index], patching)
        decided.append(starts)
    assert torch.stack(decided, dim=1).tolist() == next_starts(ids, entropies, position, patching).tolist()


@given(st.lists(documents, min_size=1, max_size=4))
def test_a_packed_document_is_patched_as_alone(patching: PatchSettings, stream: list[Document]) -> None:
    ids, entropies, position = packed(stream)
    together = next_starts(ids, entropies if patching.needs_entropies else None, position, patching)
    alone = [batch(document, patching) for document in stream]
    assert together.tolist() == [start for starts in alone for start in starts]


@given(documents, st.data())
def test_what_follows_changes_nothing_before(patching: PatchSettings, document: Document, drawn: st.DataObject) -> None:
    ids, entropies = document
    cut = drawn.draw(st.integers(1, len(ids)))
    prefix = ids[:cut], entropies[:cut]
    assert batch(prefix, patching) == batch(document, patching)[:cut]

    def lengths(part: Document) -> list[int]:
        ids, entropies, _ = tensors(part)
        return patch_lengths(ids[None], entropies[None] if patching.needs_entropies else None, patching)[0].tolist()

    *closed, _ = lengths(prefix)  # the last patch of the prefix may go on
    assert lengths(document)[: len(closed)] == closed


@pytest.mark.parametrize("include_next", [True, False])
@given(rows=st.lists(documents, min_size=1, max_size=4))
def test_lengths_of_ragged_rows(patching: PatchSettings, include_next: bool, rows: list[Document]) -> None:
    num_ids = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [-1] * (num_ids - len(ids)) for ids, _ in rows])
    padded = [entropies + [9.0] * (num_ids - len(entropies)) for _, entropies in rows]
    entropies = torch.tensor(padded) if patching.needs_entropies else None
    together = patch_lengths(ids, entropies, patching, include_next=include_next)
    assert together.dtype == torch.long
    assert together.shape[1] == max(len([length for length in row if length]) for row in together.tolist())
    for row, document in zip(together.tolist(), rows, strict=True):
        lengths = [length for length in row if length]
        assert row == lengths + [0] * (len(row) - len(lengths))  # zeros stand at the end alone
        assert min(lengths) >= 1
        assert sum(lengths) == len(document[0]) + include_next
        assert max(lengths) <= (patching.max_patch_length or num_ids + 1)
        starts = slow.starts(*document, patching)
        assert lengths == slow.lengths(starts if include_next else starts[:-1])


@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float32, 1e-7), (torch.float64, 1e-8)]
)
@pytest.mark.parametrize(
    "numbers", [{"threshold": 2.0, "monotonicity": True}, {"threshold": 1.5, "threshold_add": 2.0}]
)
def test_step_equals_batch_in_any_precision(dtype: torch.dtype, spread: float, numbers: dict[str, float]) -> None:
    patching = PatchSettings.parse(numbers)
    generator = torch.Generator().manual_seed(0)
    # Every other entropy rises by nearly 2 nats, so that whatever rounds on one path alone tips a decision.
    low, noise = torch.rand(2, 1000, generator=generator, dtype=torch.float64)
    entropies = torch.stack([low, low + 2.0 + (noise - 0.5) * spread], dim=1).view(1, -1).to(dtype)
    ids = torch.full(entropies.shape, 100)
    state, decided = PatchState.empty(1), []
    for index in range(ids.shape[1]):
        state, starts = step(state, ids[:, index], entropies[:, index], patching)
        decided.append(bool(starts))
    assert decided == next_starts(ids, entropies, torch.arange(ids.shape[1])[None], patching)[0].tolist()


def test_no_ids_and_no_rows(patching: PatchSettings) -> None:
    def lengths(ids: Tensor, include_next: bool) -> list[list[int]]:
        return patch_lengths(ids, ids.float() if patching.needs_entropies else None, patching, include_next).tolist()

    assert lengths(torch.zeros(2, 0, dtype=torch.long), include_next=True) == [[1], [1]]
    assert lengths(torch.zeros(2, 0, dtype=torch.long), include_next=False) == [[], []]
    assert lengths(torch.full((1, 3), -1), include_next=False) == [[]]
    assert lengths(torch.zeros(0, 3, dtype=torch.long), include_next=True) == []


def test_what_a_mode_needs_and_does_not_get_is_named() -> None:
    entropy = PatchSettings(threshold=1.0)
    ids = torch.full((2, 3), 100)
    with pytest.raises(UserError, match="mode 'entropy' needs the byte LM's entropies"):
        patch_lengths(ids, None, entropy)
    with pytest.raises(UserError, match="mode 'space' needs ids"):
        patch_lengths(None, ids.float(), PatchSettings(mode="space"))
    with pytest.raises(UserError, match=r"ids \[2, 3\] and entropies \[2, 2\] differ"):
        patch_lengths(ids, torch.zeros(2, 2), entropy)
    with pytest.raises(UserError, match=r"not a tensor of shape \[3\]"):
        patch_lengths(ids[0], None, PatchSettings(mode="byte"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs a threshold"),
        ({"mode": "space", "threshold": 1.0}, "threshold belongs to mode 'entropy'"),
        ({"mode": "static"}, "needs patch_size"),
        ({"mode": "static", "patch_size": 0}, "greater than or equal to 1"),
        ({"mode": "byte", "patch_size": 2}, "patch_size belongs to mode 'static'"),
        ({"mode": "bpe"}, "needs tokenizer"),
        ({"threshold": 1.0, "monotonicity": True, "threshold_add": 0.5}, "exclude each other"),
        ({"mode": "byte", "max_patch_length": 0}, "greater than or equal to 1"),
        ({"mode": "entropie", "threshold": 1.0}, "'entropie'"),
    ],
)
def test_numbers_that_do_not_belong_together_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PatchSettings.parse(values)
    with pytest.raises(ValidationError):
        PatchSettings.model_validate(values)


def test_every_mode_is_decided_on_the_device_or_explicitly_on_the_host() -> None:
    """A mode that the kernel does not know would never start a patch, or start it elsewhere."""
    assert set(get_args(ModeName)) == set(MODES)
    for name, mode in MODES.items():
        assert mode.on_host == (not set(mode.decisions) <= set(KERNEL_DECISIONS) or not mode.decisions), name
    numbers = [number.value for number in KERNEL_DECISIONS.values()]
    assert sorted(numbers) == list(range(len(numbers)))
    decisions = {decision for mode in MODES.values() for decision in mode.decisions}
    assert set(KERNEL_DECISIONS) <= decisions
    source = inspect.getsource(device_patching)
    assert [name for name in KERNEL_DECISIONS if f"MODE == {name.upper()}:" not in source] == []
    with pytest.raises(UserError, match="mode 'bpe' is not decided on the device"):
        kernel_decision(PatchSettings(mode="bpe", tokenizer="a.json"))


def test_every_decision_has_a_case() -> None:
    """Each is then compared with `slow.py`, step with batch, and the kernel with its plain form."""
    cases = [PatchSettings.parse({"tokenizer": "a.json", **v} if v["mode"] == "bpe" else v) for v in PATCHINGS.values()]
    decided = {(case.mode, case.decision) for case in cases}
    assert decided == {(mode, name) for mode, its in MODES.items() for name in its.decisions or [""]}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_a_name_in_blt_patch(mode: ModeName, tmp_path: Path, tokenizers: dict[str, str]) -> None:
    """Made of the table: the mode alone, or with the setting that the table names."""
    text, setting = "The old man\nwent down. " * 3, MODES[mode].named_by
    values: dict[str, Any] = {"tokenizer": tokenizers["byte_level"]} if mode == "bpe" else {}
    values |= next(values for values in PATCHINGS.values() if values["mode"] == mode)
    name = f"{mode}:{values[setting]}" if setting else mode
    byte_lm = tiny_byte_lm()
    save(tmp_path, byte_lm, Config(model=byte_lm.settings, context=40))
    patching = PatchSettings.parse(values)
    patcher = Patcher(patching, byte_lm if patching.needs_entropies else None)
    shown = PatchingModes(str(tmp_path)).patched([name], text)
    assert [patch.start for patch in shown[name]] == [patch.start for patch in patches_of(text.encode(), patcher)]
    assert (f"{mode}:{setting.upper()}" if setting else f" {mode},") in mode_names()
    with pytest.raises(UserError, match=r"no mode|is not a folder"):
        PatchingModes("absent").patched([mode if setting else f"{mode}:3"], text)
