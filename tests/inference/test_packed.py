"""Packed streams through the blocks that read prompts, in their plain form, against the models themselves."""

import pytest
import torch

from bytelatent.inference.packed import ROWS, packed_form
from bytelatent.model import BLTModel, ByteLM, Stream, add_patches, pack_rows
from bytelatent.model.settings import ByteLMSettings, StackSettings
from tests.model.tiny import make, tiny_blt


def padded(stream: Stream) -> Stream:
    size = -len(stream.ids) % ROWS
    zeros = torch.zeros(size, dtype=torch.long)
    return Stream(
        torch.cat([stream.ids, zeros]),
        torch.cat([stream.document, zeros - 1]),
        torch.cat([stream.position, torch.arange(size)]),
        num_documents=stream.num_documents,
    )


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kind", ["byte LM", "BLT"])
def test_logits_are_those_of_the_model(kind: str, window: int | None) -> None:
    stack = StackSettings(dim=32, num_layers=2, num_heads=2, multiple_of=8, window=window)
    model: ByteLM | BLTModel
    if kind == "BLT":
        middle = StackSettings(dim=48, num_layers=2, num_heads=3, multiple_of=8)
        model = tiny_blt(seed=1, encoder=stack, decoder=stack, global_transformer=middle)
    else:
        model = make(ByteLMSettings(**stack.model_dump()), 1)
    generator = torch.Generator().manual_seed(0)
    stream = padded(pack_rows([torch.randint(260, [size], generator=generator) for size in (19, 1, 40)]))
    if kind == "BLT":
        starts = torch.rand(len(stream.ids), generator=generator) < 0.4
        stream = add_patches(stream, starts)
    fast, real = packed_form(model), stream.document >= 0
    assert fast is not None
    with torch.no_grad():
        torch.testing.assert_close(fast(stream)[real], model(stream)[real], rtol=1e-4, atol=1e-5)


def test_what_the_kernels_cannot_run_is_left_to_the_model() -> None:
    assert packed_form(tiny_blt()) is None  # heads of 8
