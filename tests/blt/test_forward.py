"""The forward pass: the trainer's losses and gradients, rows that do not depend on others, states and weights."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bytelatent import BLT
from bytelatent.data import pack, split_document
from bytelatent.errors import UserError
from bytelatent.model import Rows, add_patches
from bytelatent.model.loss import cross_entropy
from bytelatent.patching import PatchSettings
from bytelatent.text import Document
from bytelatent.training.gradients import Gradients
from tests.model import slow
from tests.model.tiny import blt_settings, make, tiny_blt
from tests.test_blt import slow_starts, wrap

TEXTS = ["a text", "x", "é你😀 and more of it", "", "the last of them\n is longer"]
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def blt() -> BLT:
    return wrap(tiny_blt(window=6))


def fresh(**changes: Any) -> BLT:
    return wrap(tiny_blt(window=6, **changes))


def trained(blt: BLT, texts: list[str]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss and the gradients that the trainer has of these texts."""
    pieces = blt.patcher([piece for text in texts for piece in split_document(Document(text.encode()), 1000)])
    batch = pack(pieces)
    nats = Gradients(lambda batch: cross_entropy(blt.model, batch), blt.device)(batch, batch.num_targets)
    gradients = {name: weight.grad.clone() for name, weight in blt.model.named_parameters() if weight.grad is not None}
    blt.zero_grad()
    return float(nats) / batch.num_targets, gradients


def padded(ids: Tensor, left: list[int]) -> tuple[Tensor, Tensor]:
    """Rows moved to the right, with a mask, and 0 at padding."""
    rows = [row[row >= 0] for row in ids]
    size = max(len(row) + before for row, before in zip(rows, left, strict=True))
    out, mask = torch.zeros(len(rows), size, dtype=torch.long), torch.zeros(len(rows), size, dtype=torch.long)
    for number, (row, before) in enumerate(zip(rows, left, strict=True)):
        out[number, before : before + len(row)] = row
        mask[number, before : before + len(row)] = 1
    return out, mask


@pytest.mark.parametrize("stop_at_document", [True, False])
def test_loss_and_gradients_are_the_trainers(stop_at_document: bool) -> None:
    ours = fresh(stop_at_document=stop_at_document)
    loss, gradients = trained(ours, TEXTS)
    ids = ours.encode(TEXTS, end=True)
    for given_ids, mask in ((ids, None), padded(ids, [3, 0, 1, 7, 2])):
        ours.train()
        found = ours(given_ids, attention_mask=mask, labels=given_ids)
        found.loss.backward()
        assert found.loss.item() == pytest.approx(loss, abs=1e-5)
        own = {name: weight.grad for name, weight in ours.model.named_parameters() if weight.grad is not None}
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(own[name], gradient, **CLOSE)
        assert ours.entropy_model is not None
        assert all(weight.grad is None for weight in ours.entropy_model.parameters())
        ours.zero_grad()


def test_logits_are_those_of_a_slow_model(blt: BLT) -> None:
    ids = blt.encode(TEXTS)
    found = blt(ids)
    assert found.logits.dtype == torch.float32
    for row, logits, starts in zip(ids, found.logits, found.starts, strict=True):
        own = row[row >= 0].tolist()
        expected = slow_starts(blt, own)
        slow_logits = slow.blt(blt.model.settings, blt.model.state_dict(), own, expected)
        np.testing.assert_allclose(logits[: len(own)].detach().numpy(), slow_logits, atol=1e-4, rtol=1e-4)
        assert starts[: len(own)].tolist() == [True, *expected[:-1]]
        assert not logits[len(own) :].any()
        assert not starts[len(own) :].any()


@settings(max_examples=12)
@given(st.data())
def test_a_row_is_the_same_alone_and_in_any_padding(data: st.DataObject) -> None:
    shape = data.draw(blt_settings())
    mode = data.draw(st.sampled_from([PatchSettings(mode="space"), PatchSettings(mode="static", patch_size=3)]))
    ours = wrap(make(shape, seed=1), mode, with_byte_lm=False)
    texts = data.draw(st.lists(st.binary(max_size=12), min_size=1, max_size=4))
    ids = ours.encode(texts)
    left = [data.draw(st.integers(0, 5)) for _ in texts]
    moved, mask = padded(ids, left)
    labels = moved.masked_fill(torch.rand(moved.shape) < 0.3, -100)
    together = ours(moved, mask, labels, output_hidden_states=True, output_attentions=True)
    nats, count = 0.0, 0
    for number, (text, before) in enumerate(zip(texts, left, strict=True)):
        alone = ours(ours.encode(text), output_hidden_states=True, output_attentions=True)
        its, size = slice(before, before + len(text) + 1), len(text) + 1
        torch.testing.assert_close(together.logits[number, its], alone.logits[0], **CLOSE)
        torch.testing.assert_close(together.byte_states[number, its], alone.byte_states[0], **CLOSE)
        patches = alone.patch_states.shape[1]
        torch.testing.assert_close(together.patch_states[number, :patches], alone.patch_states[0], **CLOSE)
        assert not together.patch_states[number, patches:].any()
        assert together.patch_of_byte[number, its].equal(alone.patch_of_byte[0])
        assert (together.patch_of_byte[number, ~mask[number].bool()] == -1).all()
        for ours_, its_own in zip(together.attentions.encoder, alone.attentions.encoder, strict=True):
            torch.testing.assert_close(ours_[number, :, its, its], its_own[0], **CLOSE)
        for ours_, its_own in zip(together.attentions.decoder_cross, alone.attentions.decoder_cross, strict=True):
            torch.testing.assert_close(ours_[number, ..., its], its_own[0], **CLOSE)
        targets = labels[number, its][1:]
        nats += F.cross_entropy(alone.logits[0, : size - 1], targets, reduction="sum").item() if size > 1 else 0.0
        count += int((targets != -100).sum())
    assert together.loss.item() == pytest.approx(nats / max(count, 1), abs=1e-5)


def test_given_patches(blt: BLT) -> None:
    ids = blt.encode(["abcd", "ab"])
    lengths = torch.tensor([[1, 3, 1], [2, 1, 0]])
    found = blt(ids, patch_lengths=lengths)
    assert found.entropies is None
    assert found.patch_of_byte.tolist() == [[0, 1, 1, 1, 2], [0, 0, 1, -1, -1]]
    assert found.starts.tolist() == [[True, True, False, False, True], [True, False, True, False, False]]
    torch.testing.assert_close(found.logits, blt.logits(ids, lengths))
    moved, mask = padded(ids, [1, 2])
    torch.testing.assert_close(blt(moved, mask, patch_lengths=lengths).logits[1, 2:5], found.logits[1, :3], **CLOSE)


def test_the_output_is_indexed_as_those_of_transformers(blt: BLT) -> None:
    ids = blt.encode(["ab"])
    found = blt(ids, labels=ids)
    assert found[0] is found["loss"] is found.loss
    assert found[1] is found.logits
    assert found[:2] == (found.loss, found.logits)
    assert list(found) == found.keys() == ["loss", "logits", "starts", "patch_of_byte", "entropies"]
    assert len(found.to_tuple()) == len(found) == 5
    assert "hidden_states" not in found
    with pytest.raises(KeyError):
        found["hidden_states"]
    assert blt(ids)[0].shape == (1, 3, 260)


def test_hidden_states_are_what_hooks_see(blt: BLT) -> None:
    ids = blt.encode(TEXTS[:3])
    seen: dict[str, Tensor] = {}
    stack = blt.model.global_transformer.stack
    hooks = [
        stack.blocks[0].register_forward_hook(lambda _, args, out: seen.update(middle=out)),
        blt.model.encoder.register_forward_hook(lambda _, args, out: seen.update(bytes=out[0], patches=out[1])),
        blt.model.global_transformer.register_forward_hook(lambda _, args, out: seen.update(out=out)),
    ]
    found = blt(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert [len(part) for part in vars(found.hidden_states).values()] == [3, 3, 3]
    assert found.byte_states[ids >= 0].equal(seen["bytes"])
    per_row = [int(row.max()) + 1 for row in found.patch_of_byte]
    for name, states in (("patches", found.patch_inputs), ("out", found.patch_states)):
        assert torch.cat([row[:size] for row, size in zip(states, per_row, strict=True)]).equal(seen[name])
    middle = found.hidden_states.global_transformer[1]
    assert torch.cat([row[:size] for row, size in zip(middle, per_row, strict=True)]).equal(seen["middle"])
    first = blt.model.encoder.embed(add_patches(Rows(ids, ids >= 0).stream, torch.zeros(int((ids >= 0).sum())).bool()))
    assert found.hidden_states.encoder[0][ids >= 0].equal(first)
    logits = blt.model.decoder.output(blt.model.decoder.norm(found.hidden_states.decoder[-1]))
    torch.testing.assert_close(logits[ids >= 0], found.logits[ids >= 0])
    part = blt.model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in part.modules())


def test_recording_changes_nothing_and_has_gradients() -> None:
    ours = fresh()
    ids = ours.encode(TEXTS, end=True)
    plain = ours(ids, labels=ids)
    found = ours(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert found.logits.equal(plain.logits)
    assert found.loss.equal(plain.loss)
    (found.byte_states.sum() + found.attentions.global_transformer[0].square().sum()).backward()
    assert ours.model.encoder.embedding.weight.grad is not None
    assert ours.model.global_transformer.stack.blocks[0].attention.query.weight.grad.any()


def test_attention_weights_give_what_attention_gives(blt: BLT) -> None:
    """The weights of each layer times its values are its output, whatever mask attends: banded, dense, by patches."""
    ids = blt.encode(TEXTS)
    is_real = ids >= 0
    seen: dict[nn.Module, tuple[Any, Tensor]] = {}
    parts = [blt.model.encoder, blt.model.global_transformer, blt.model.decoder]
    watched = [block.attention for part in parts for block in part.stack.blocks]
    watched += [cross for part in (parts[0], parts[2]) for cross in part.cross_attention]
    hooks = [each.register_forward_hook(lambda at, args, out: seen.update({at: (args, out)})) for each in watched]
    found = blt(ids, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    weights = found.attentions
    patch_real = torch.arange(found.patch_states.shape[1]) <= found.patch_of_byte.amax(1)[:, None]
    for part, real in ((parts[0], is_real), (parts[1], patch_real), (parts[2], is_real)):
        name = {0: "encoder", 1: "global_transformer", 2: "decoder"}[parts.index(part)]
        for block, weight in zip(part.stack.blocks, getattr(weights, name), strict=True):
            (x, rotary, _), out = seen[block.attention]
            v = block.attention.value(x).unflatten(-1, (-1, 2 * rotary.shape[1]))
            rows = torch.zeros(*real.shape, *v.shape[1:]).masked_scatter(real[:, :, None, None], v)
            mixed = torch.einsum("bhqk,bkhe->bqhe", weight, rows)[real]
            torch.testing.assert_close(block.attention.output(mixed.flatten(1)), out, **CLOSE)
            torch.testing.assert_close(weight.sum(-1), real[:, None].float().expand(weight.shape[:-1]), **CLOSE)
    assert weights.encoder[0].shape[-1] > 12 == 2 * blt.model.settings.encoder.window  # so that the mask is banded
    patch = torch.cat([row[row >= 0] for row in found.patch_of_byte])
    first = torch.cat([torch.tensor([True]), patch[1:] < patch[:-1]]) | (patch == 0) & (ids[is_real] == 1)
    patch = patch + torch.where(first, torch.cat([torch.zeros(1).long(), patch[:-1] + 1]), 0).cumsum(0)
    [cross], [weight] = parts[0].cross_attention, weights.encoder_cross
    (x, states, _), out = seen[cross]
    v = cross.keys_values(states)[1]
    flat = weight.permute(0, 3, 2, 1)[is_real]  # [T, K, H]
    mixed = torch.zeros(*x.shape[:2], *v.shape[1:]).index_add(0, patch, flat.unsqueeze(-1) * v.unsqueeze(1))
    torch.testing.assert_close(2 * x + cross.output(mixed.flatten(-2)), out, **CLOSE)
    for cross, weight in zip(parts[2].cross_attention, weights.decoder_cross, strict=True):
        (x, states, ranges), out = seen[cross]
        v, flat = cross.keys_values(states)[1], weight.permute(0, 3, 2, 1)[is_real]
        mixed = (flat.unsqueeze(-1) * v[ranges.patch_T.clamp(min=0)]).sum(1)
        torch.testing.assert_close(2 * x + cross.output(mixed.flatten(-2)), out, **CLOSE)
        sums = flat.sum(1)
        torch.testing.assert_close(sums, (ranges.patch_T >= 0)[:, None].float().expand_as(sums), **CLOSE)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_ten_lines_train_it_with_parts_frozen(optimizer: Any) -> None:
    blt = fresh()
    blt.model.global_transformer.requires_grad_(False)
    before = {name: weight.clone() for name, weight in blt.named_parameters()}
    ids = blt.encode(TEXTS, end=True)
    steps = optimizer(blt.parameters(), lr=1e-2)
    blt.train()
    losses = []
    for _ in range(5):
        loss = blt(ids, labels=ids).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, weight in blt.named_parameters() if not weight.equal(before[name])}
    assert "model.encoder.embedding.weight" in changed
    assert not any(name.startswith(("model.global_transformer", "entropy_model")) for name in changed)
    assert blt.num_parameters(only_trainable=True) < blt.num_parameters()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda blt, ids: blt(ids[0]), r"^forward: it takes ids \[B, N\], not \[3\]; blt.encode makes them"),
        (lambda blt, ids: blt("text"), r"^forward: it takes ids \[B, N\], not str"),
        (lambda blt, ids: blt(ids, torch.ones(1, 2)), r"^forward: attention_mask \[1, 2\] and ids \[1, 3\] differ"),
        (lambda blt, ids: blt(ids, torch.tensor([[1, 0, 1]])), "^forward: padding .* not between its ids"),
        (lambda blt, ids: blt(ids, labels=ids[:, 1:]), r"^forward: labels \[1, 2\] and input_ids \[1, 3\] differ"),
        (lambda blt, ids: blt(ids, labels=ids + 300), "^labels: ids are whole numbers from 0 to 259, and -100"),
        (lambda blt, ids: blt(ids + 300), "^forward: ids are whole numbers from 0 to 259"),
        (lambda blt, ids: blt(ids.float()), "^forward: ids are whole numbers"),
        (lambda blt, ids: blt(ids, patch_lengths=torch.tensor([[1]])), "patch_lengths sum to 1; a row of 3 ids"),
        (lambda blt, ids: blt(ids, patch_lengths=torch.ones(3)), "^forward: patch_lengths"),
        (lambda blt, ids: blt(ids, patch_lengths=[[3]]), "^forward: patch_lengths is a tensor, not list"),
        (lambda blt, ids: blt.logits(ids, [[3]]), "^logits: patch_lengths is a tensor, not list"),
        (lambda blt, ids: blt(ids, labels=[[1, 2, 3]]), "^forward: labels is a tensor, not list"),
        (lambda blt, ids: blt(ids, labels=ids.float()), "^labels: ids are whole numbers"),
        (lambda blt, ids: blt(ids, [[1, 1, 1]]), "^forward: attention_mask is a tensor, not list"),
        (lambda blt, ids: blt(ids, torch.tensor([[1, 0.5, 0]])), "^forward: attention_mask holds 0.5; it is 1 at ids"),
        (lambda blt, ids: blt(ids, torch.tensor([[0, 0, -torch.inf]])), "^forward: attention_mask holds -inf"),
        (lambda blt, ids: blt(ids, torch.zeros(1, 3)), "^forward: attention_mask is 0.0 everywhere"),
        (lambda blt, ids: blt(ids * 0 - 1, ids > 0), "^forward: attention_mask is 1 where ids are -1"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str, blt: BLT) -> None:
    with pytest.raises(UserError, match=message):
        call(blt, blt.encode(["ab"]))


def test_rows_without_ids(blt: BLT) -> None:
    ids = torch.tensor([[-1, -1], [1, 70]])
    found = blt(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert not found.logits[0].any()
    torch.testing.assert_close(found.logits[1], blt(ids[1:]).logits[0])
    empty = blt(ids[:1], labels=ids[:1], output_hidden_states=True, output_attentions=True)
    assert empty.logits.shape == (1, 2, 260)
    assert empty.loss == 0
    assert blt(ids, labels=torch.full_like(ids, -100)).loss == 0
    for shape in ((0, 0), (2, 0)):
        assert blt(torch.zeros(shape, dtype=torch.long)).logits.shape == (*shape, 260)
