"""What transformers' own tests ask of every causal language model, beside what other files here hold."""

import copy
import inspect
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LogitsProcessorList, PreTrainedModel

from bytelatent import BLT
from bytelatent.hf import BytelatentForCausalLM, BytelatentTokenizer
from tests.weights.test_hugging_face import random_rows

ROWS = random_rows(0)
MASK = (ROWS >= 0).long()
IDS = ROWS.clamp(min=0)
GIVEN = {"input_ids": IDS, "attention_mask": MASK}
ALL = {"output_hidden_states": True, "output_attentions": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
tokenizer = BytelatentTokenizer()


@pytest.fixture
def model(folder: Path) -> BytelatentForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_the_class(model: BytelatentForCausalLM) -> None:
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, GenerationMixin)
    assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name == "input_ids"
    assert model.num_parameters() == sum(weight.numel() for weight in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    assert model.num_parameters(exclude_embeddings=True) <= model.num_parameters() - embedding
    pairs = model.named_parameters(remove_duplicate=False)
    assert len({weight.data_ptr() for _, weight in pairs}) == len(model.state_dict())  # none is tied
    assert model(**model.dummy_inputs).logits.shape == (*model.dummy_inputs["input_ids"].shape, 260)


def test_batches(model: BytelatentForCausalLM) -> None:
    """Every output of a row is that of the row alone, and the same again."""
    whole = model(**GIVEN, **ALL)
    assert torch.equal(model(**GIVEN).logits, whole.logits)
    for row in range(len(IDS)):
        size = int(MASK[row].sum())
        alone = model(IDS[row : row + 1, :size], **ALL)
        torch.testing.assert_close(alone.logits[0], whole.logits[row, :size], **CLOSE)
        for mine, of_all in zip(alone.hidden_states, whole.hidden_states, strict=True):
            torch.testing.assert_close(mine[0], of_all[row, :size], **CLOSE)
        for mine, of_all in zip(alone.attentions, whole.attentions, strict=True):
            assert mine.shape[1] == model.config.model["decoder"]["num_heads"]
            torch.testing.assert_close(mine[0], of_all[row, :, :size, :size], **CLOSE)
            torch.testing.assert_close(mine.sum(-1), torch.ones(mine.shape[:-1]))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_by_configuration(model: BytelatentForCausalLM, name: str) -> None:
    """What a configuration asks for is given, unless a call says otherwise; so a tuple."""
    found = name.removeprefix("output_")
    asked = model(**GIVEN, **{name: True})[found]
    assert found not in model(**GIVEN)
    setattr(model.config, name, True)
    torch.testing.assert_close(model(**GIVEN)[found], asked, rtol=0, atol=0)
    assert found not in model(**GIVEN, **{name: False})
    model.config.return_dict = False
    logits, as_tuple = model(**GIVEN)
    assert torch.equal(logits, model(**GIVEN, return_dict=True).logits)
    torch.testing.assert_close(as_tuple, asked, rtol=0, atol=0)


def test_gradients_of_states(model: BytelatentForCausalLM) -> None:
    """Those of hidden states, in every part, are what hooks on the layers see."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, out: Tensor) -> None:
            out.retain_grad()
            seen[name] = out

        return hook

    parts = ("encoder", "global_transformer", "decoder")
    hooks = [getattr(model.model, name).stack.blocks[0].register_forward_hook(keep(name)) for name in parts]
    model.blt(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    for hook in hooks:
        hook.remove()
    expected = {name: state.grad for name, state in seen.items()}
    out = model.blt(IDS, attention_mask=MASK, labels=IDS, output_hidden_states=True)
    states = [getattr(out.hidden_states, name)[1] for name in parts]
    found = torch.autograd.grad(out.loss, [*states, out.patch_inputs, out.hidden_states.decoder[0]])
    for name, gradient in zip(parts, found, strict=False):
        torch.testing.assert_close(gradient[gradient.abs().amax(-1) > 0].sum(0), expected[name].sum(0), **CLOSE)
        assert expected[name].abs().max() > 1e-5
    assert all(gradient.abs().max() > 0 for gradient in found)
    assert (found[0][MASK == 0] == 0).all()
    first = model(**GIVEN, output_hidden_states=True)
    first.hidden_states[0].retain_grad()
    first.logits.sum().backward()
    assert first.hidden_states[0].grad.abs().max() > 0


def test_states_in_threads(model: BytelatentForCausalLM) -> None:
    """Threads that use one model at the same time get the states of their own texts."""
    rows = [IDS[row : row + 1, : int(MASK[row].sum())] for row in range(len(IDS))]
    expected = [model(row, **ALL) for row in rows]
    found: list[Any] = [None] * len(rows)

    def read(number: int) -> None:
        found[number] = [model(rows[number], **ALL) for _ in range(8)]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, one in zip(found, expected, strict=True):
        for out in outs:
            torch.testing.assert_close((out.hidden_states, out.attentions), (one.hidden_states, one.attentions))


def test_compiled(model: BytelatentForCausalLM) -> None:
    """`torch.compile` changes neither values nor gradients; shapes may change between calls."""
    model.train()
    expected = model(**GIVEN, labels=IDS)
    expected.loss.backward()
    before = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    out = compiled(**GIVEN, labels=IDS)
    out.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(gradients(model), before, **CLOSE)
    short = compiled(IDS[:2, :7]).logits
    torch.testing.assert_close(short, model(IDS[:2, :7]).logits, **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision(model: BytelatentForCausalLM, dtype: torch.dtype, tmp_path: Path) -> None:
    """Computed, saved and loaded as it is, with the patches of float32."""
    expected = model(**GIVEN).logits
    starts = model.blt(IDS, attention_mask=MASK).starts
    model = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float64: model.double}[dtype]()
    found = model(**GIVEN).logits
    assert torch.equal(model.blt(IDS, attention_mask=MASK).starts, starts)
    torch.testing.assert_close(found, expected, rtol=0, atol=max(40 * torch.finfo(dtype).eps, 1e-4))
    assert model.generate(**GIVEN, max_new_tokens=3).shape == (len(IDS), IDS.shape[1] + 3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(**GIVEN).logits, found)


def test_copy_with_checkpointing(model: BytelatentForCausalLM) -> None:
    """A copy recomputes its own layers, not those of the model that it was made from; reentrant or not, the same."""
    model.train()
    model(**GIVEN, labels=IDS).loss.backward()
    expected = gradients(model)
    for reentrant in (True, False):
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
            {"use_reentrant": reentrant}
        )
        other = copy.deepcopy(model)
        other.zero_grad()
        other(**GIVEN, labels=IDS).loss.backward()
        torch.testing.assert_close(gradients(other), expected, rtol=1e-5, atol=1e-7)


def test_logits_to_keep(model: BytelatentForCausalLM) -> None:
    whole = model(**GIVEN, labels=IDS)
    for kept, columns in ((0, slice(None)), (1, slice(-1, None)), (3, slice(-3, None)), (torch.tensor([0, 5]), [0, 5])):
        found = model(**GIVEN, labels=IDS, logits_to_keep=kept)
        assert torch.equal(found.logits, whole.logits[:, columns])
        assert torch.equal(found.loss, whole.loss)


def prompts(side: str) -> dict[str, Tensor]:
    texts = ["The history of", "a", "été \u6f22"]
    return dict(tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "num_return_sequences": 2}])
def test_states_of_generation(model: BytelatentForCausalLM, settings: dict[str, Any], side: str) -> None:
    """In transformers' layout: the prompt's, then those of each new id; each as of the text alone."""
    given = prompts(side)
    size, num_new = given["input_ids"].shape[1], 6
    torch.manual_seed(0)
    found = model.generate(**given, **settings, **ALL, max_new_tokens=num_new, return_dict_in_generate=True)
    assert len(found.hidden_states) == len(found.attentions) == found.sequences.shape[1] - size
    mask = given["attention_mask"].repeat_interleave(settings.get("num_return_sequences", 1), 0).bool()
    for row, ids in enumerate(found.sequences):
        new = ids[size:].tolist()
        length = new.index(2) + 1 if 2 in new else len(new)
        text = torch.cat([ids[:size][mask[row]], ids[size : size + length]])
        alone = model(text[None, :-1], **ALL)
        columns = [*mask[row].nonzero()[:, 0].tolist(), *range(size, size + length - 1)]
        for layer in range(len(alone.hidden_states)):
            states = torch.cat([step[layer][row] for step in found.hidden_states])
            torch.testing.assert_close(states[columns], alone.hidden_states[layer][0], **CLOSE)
        for layer in range(len(alone.attentions)):
            assert found.attentions[0][layer].shape[2:] == (size, size)
            for at, step in enumerate(found.attentions[1:length], size):
                assert step[layer].shape[2:] == (1, at + 1)
                weights = step[layer][row, :, 0][:, [column for column in columns if column <= at]]
                place = columns.index(at)
                expected = alone.attentions[layer][0, :, place, : place + 1]
                torch.testing.assert_close(weights, expected, **CLOSE)


def test_arguments_of_generate(model: BytelatentForCausalLM) -> None:
    """What others pass changes nothing, in any mode."""
    given = prompts("left")
    expected = model.generate(**given, max_new_tokens=5)
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model.train()
    for more in ({"use_cache": False}, {"position_ids": positions}, {"synced_gpus": False}, {"streamer": None}):
        assert torch.equal(model.generate(**given, max_new_tokens=5, **more), expected)
    assert model.training
    with torch.inference_mode():
        assert torch.equal(model.generate(given["input_ids"].int(), max_new_tokens=5), expected)
    unchanged = LogitsProcessorList([lambda ids, scores: scores])
    [greedy] = model.generate(**prompts("left"), max_new_tokens=5, logits_processor=unchanged)[:1]
    assert torch.equal(greedy, expected[0])
    with pytest.raises(ValueError, match="guidance_scale"):
        model.generate(**given, guidance_scale=1.5)


def test_loaded(model: BytelatentForCausalLM, folder: Path, tmp_path: Path) -> None:
    """Where tensors are made on `meta`; the model in the package by its name; what is no folder."""
    with torch.device("meta"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(**GIVEN).logits, model(**GIVEN).logits)
    tiny, named = BLT.from_pretrained("tiny", device="cpu"), AutoModelForCausalLM.from_pretrained("tiny")
    assert torch.equal(named(IDS).logits, tiny.logits(IDS))
    assert AutoTokenizer.from_pretrained("tiny").model_max_length == tiny.context
    with pytest.raises(ValueError, match="name a model"):
        BytelatentForCausalLM.from_pretrained(None, config=model.config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' is a file; name a folder"):
        model.save_pretrained(tmp_path / "file")
