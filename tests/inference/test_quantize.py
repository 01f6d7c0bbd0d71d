"""A model with rounded matrices: which numbers they hold, and that every way of reading it multiplies those."""

from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference import Decoder, Engine, Sampling, prompt_ids
from bytelatent.inference.quantize import QuantizedLinear, quantize_model
from bytelatent.inference.settings import Quantization
from bytelatent.inference.step import CapturedSlots, PrefillDecoder, engine_for
from tests.inference.test_decoder import check, full_logits
from tests.inference.test_engine import NAMES, PROMPTS, decoder_of, wide_blt

BOTH: tuple[Quantization, ...] = ("int8", "fp8")
# Sign, four bits of exponent, three more; the very last one would be NaN.
STEPS = [(bits % 8) * 2.0**-9 if bits < 8 else (1 + bits % 8 / 8) * 2.0 ** (bits // 8 - 7) for bits in range(127)]
FP8 = torch.tensor([-step for step in STEPS] + STEPS, dtype=torch.float64)
ODD = torch.arange(127, dtype=torch.float64).repeat(2) % 2  # of two as near, the one with an even last bit counts
LEFT_ALONE = ("embedding", "tables", "decoder.output")
NORMS = {
    "attention.query": "attention_norm",
    "attention.key": "attention_norm",
    "attention.value": "attention_norm",
    "feed_forward.gate": "feed_forward_norm",
    "feed_forward.up": "feed_forward_norm",
}
CROSS_NORMS = {"query": "query_norm", "key": "key_value_norm", "value": "key_value_norm"}


def norm_before(name: str) -> str | None:
    """The norm whose output a matrix multiplies."""
    known, depth = (CROSS_NORMS, 1) if "cross_attention" in name else (NORMS, 2)
    path = name.split(".")
    norm = known.get(".".join(path[-depth:]))
    return norm and ".".join([*path[:-depth], norm, "weight"])


def slowly_quantized(model: Any, quantize: str) -> Any:
    """The same numbers by another way: fp8 by a search among all there are. Only what is to be rounded is computed in
    float32 here, too: some of thousands of numbers lie too near the middle for it not to matter."""
    slow = deepcopy(model)
    tensors = slow.state_dict()
    folded = set()
    for key, weight in tensors.items():
        name = key.removesuffix(".weight")
        if weight.dim() < 2 or name == "output" or any(part in name for part in LEFT_ALONE):
            continue
        matrix = weight
        if norm := norm_before(name):
            matrix = matrix * tensors[norm]
            folded.add(norm)
        scale = matrix.abs().amax(1, keepdim=True) / (127 if quantize == "int8" else 448)
        unit = (matrix / scale).double()
        # A quotient in float32 is on a middle, or 1e-7 from it.
        far = (unit[..., None] - FP8).abs() + 1e-9 * ODD * FP8.abs()
        near = unit.round() if quantize == "int8" else FP8[far.argmin(-1)]
        tensors[key] = (near * scale).float()
    slow.load_state_dict(tensors | {norm: torch.ones_like(tensors[norm]) for norm in folded})
    return slow


@pytest.mark.parametrize("quantize", BOTH)
@pytest.mark.parametrize("name", ["byte LM", "entropy", "all layers"])
def test_these_matrices_are_quantized_so(name: str, quantize: Quantization) -> None:
    model = decoder_of(name).model
    before = deepcopy(model.state_dict())
    copied = quantize_model(model, quantize)
    found, expected = copied.state_dict(), slowly_quantized(model, quantize).state_dict()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=0, msg=key)
    assert any(not torch.equal(value, before[key]) for key, value in found.items())
    alone = [key for key in found if any(part in key for part in LEFT_ALONE)]
    assert all(copied.get_parameter(key) is model.get_parameter(key) for key in alone), "there is another copy of it"
    assert alone
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the model itself was changed"


def numbers(model: Any) -> tuple[int, int]:
    """Numbers stored as bytes, and as anything else but scales."""
    quantized = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    assert all(part.matrix.values.element_size() == 1 for part in quantized)
    return sum(part.matrix.values.numel() for part in quantized), sum(part.numel() for part in model.parameters())


@pytest.mark.parametrize("quantize", BOTH)
def test_bytes_and_written_out(quantize: Quantization) -> None:
    """Both are one model; as bytes it has no other copy of a matrix."""
    decoder = decoder_of("entropy")
    as_bytes, written = (quantize_model(decoder.model, quantize, as_bytes=stored) for stored in (True, False))
    stored, rest = numbers(as_bytes)
    assert numbers(written) == (0, stored + rest)
    assert stored > rest / 2
    rows = [prompt_ids(prompt) for prompt in PROMPTS]
    found, expected = (
        full_logits(Decoder(model, decoder.patching, decoder.byte_lm), rows) for model in (as_bytes, written)
    )
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=0)


def engine_of(decoder: Decoder, quantize: Quantization, kind: str) -> Engine:
    if kind == "engine_for":
        return engine_for(decoder.model, decoder.patching, decoder.byte_lm, 3, quantize)
    model = quantize_model(decoder.model, quantize, as_bytes=True)
    if kind == "plain":
        return Engine.plain(Decoder(model, decoder.patching, decoder.byte_lm), 3)
    fast = PrefillDecoder(model, decoder.patching, decoder.byte_lm)
    return Engine(fast, CapturedSlots(fast, 3), 3)


@pytest.mark.parametrize("quantize", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_what_an_engine_draws_has_the_quantized_models_probability(name: str, quantize: Quantization) -> None:
    """By the kernels' plain forms, too. A byte LM that finds patches is not quantized."""
    decoder = decoder_of(name)
    slow = Decoder(slowly_quantized(decoder.model, quantize), decoder.patching, decoder.byte_lm)
    for kind in ("engine_for", "plain", "fast"):
        engine = engine_of(decoder, quantize, kind)
        assert engine.decoder.byte_lm is decoder.byte_lm
        asked = [engine.submit(prompt_ids(prompt), Sampling(seed=3), 12)[0] for prompt in PROMPTS]
        engine.run()
        for one in asked:
            ids = torch.tensor(one.ids)
            logits = full_logits(slow, [torch.cat([one.prompt, ids])])[0][len(one.prompt) - 1 : -1]
            expected = logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.log_probabilities), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantize", BOTH)
@settings(max_examples=4)
@given(seed=st.integers(0, 1000), data=st.data())
def test_prompts_and_steps_read_one_model(quantize: Quantization, seed: int, data: st.DataObject) -> None:
    decoder = decoder_of("split", seed)
    model = quantize_model(decoder.model, quantize, as_bytes=True)
    check(PrefillDecoder(model, decoder.patching, decoder.byte_lm), [30, 1, 140], seed, data)


def test_matrices_in_bfloat16() -> None:
    """Norms are multiplied in before anything is rounded, and what is rounded keeps its own precision."""
    model = wide_blt(0).to(torch.bfloat16)
    for quantize, as_bytes in product(BOTH, (True, False)):
        found = quantize_model(model, quantize, as_bytes=as_bytes)
        assert {part.dtype for part in found.parameters()} == {torch.bfloat16}
        one: Any = found.decoder.stack.blocks[0].attention.query
        block: Any = model.decoder.stack.blocks[0]
        exact = block.attention.query.weight.double() * block.attention_norm.weight.double()
        numbers: Tensor = one.matrix.dense(torch.float32) if as_bytes else one.weight.float()
        largest = exact.abs().amax(1, keepdim=True)
        allowed = largest / (254 if quantize == "int8" else 28)  # half a step, of those next to 448 it is 16
        if not as_bytes:
            allowed = allowed + exact.abs() * 2**-8
        assert ((numbers.double() - exact).abs() <= allowed * 1.0001).all()


def test_what_will_not_do() -> None:
    model = wide_blt(0)
    assert quantize_model(model, "full") is model
    unknown: Any = "int4"
    with pytest.raises(UserError, match="quantize: 'int4' is not one of full, int8, fp8"):
        quantize_model(model, unknown)
    with torch.no_grad():
        middle: Any = model.global_transformer.stack.blocks[1]
        middle.feed_forward.down.weight[3, 2] = torch.nan
    with pytest.raises(
        UserError, match=r"'global_transformer\.stack\.blocks\.1\.feed_forward\.down', in which there is NaN"
    ):
        quantize_model(model, "fp8")
