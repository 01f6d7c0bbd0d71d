"""Activation checkpointing changes what is kept, not what comes out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bytelatent.kernels import packed_attention
from bytelatent.model import add_patches, compile_regions, pack_rows
from bytelatent.model.attention import packed_mask
from bytelatent.training.distributed.parallelize import apply_activation_checkpointing, checkpointed
from bytelatent.training.distributed.settings import ActivationCheckpointing
from tests.model.tiny import random_ids, random_starts, stream_of, tiny_blt, tiny_byte_lm


def step(how: ActivationCheckpointing) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients; numbers kept for the backward pass; operations, of matrix products and attention, in both."""
    generator = torch.Generator().manual_seed(0)
    ids = random_ids(generator, 96)
    batch = add_patches(stream_of([ids]), random_starts(generator, 96))
    model: Any = tiny_blt()
    apply_activation_checkpointing(model, how)
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = F.cross_entropy(model(batch), ids)
        held = sum(value.untyped_storage().nbytes() for value in kept.values())
        kept.clear()
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, held, counter.get_total_flops()


@pytest.mark.parametrize("how", ["selective", "full"])
def test_the_same_gradients_from_less(how: ActivationCheckpointing) -> None:
    before, kept_before, flops_before = step("none")
    after, kept, flops = step(how)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    if how == "full":
        assert kept < kept_before / 2
        # Most of a forward pass, a third of all, comes again; not a block's last product, which nothing needs.
        assert flops_before * 1.15 < flops < flops_before * 4 / 3
    else:
        assert flops_before <= flops < flops_before * 1.1  # attention with a mask is made of batched products here


@pytest.mark.parametrize(("how", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_packed_attention_is_kept(how: ActivationCheckpointing, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_byte_lm(num_layers=3)
    for block in model.stack.blocks:
        block.forward = checkpointed(block.forward, how)
    plain, seen = packed_attention.plain_packed_attention, []
    monkeypatch.setattr(packed_attention, "plain_packed_attention", lambda *given: seen.append(1) or plain(*given))
    stream = pack_rows([torch.arange(9)])
    monkeypatch.setattr(model.stack, "mask", lambda document, _: packed_mask(document, None, 1))
    model(stream).sum().backward()
    assert len(seen) == 3 * times


def test_what_is_compiled_is_the_forward_that_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_byte_lm(0)
    ran: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *given: ran.append(forward) or forward(*given))
    wrapped = [checkpointed(block.forward, "full") for block in model.stack.blocks]
    for block, forward in zip(model.stack.blocks, wrapped, strict=True):
        block.forward = forward
    compile_regions(model)
    model(stream_of([torch.tensor([1, 5, 6])]))
    assert ran == wrapped
