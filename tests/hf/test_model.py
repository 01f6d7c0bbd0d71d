"""Forward pass, saving, moving: what transformers asks of every model, and that it is our model's own."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.hf import BytelatentForCausalLM
from tests.weights.test_hugging_face import random_rows

ROWS = random_rows(0)
MASK = (ROWS >= 0).long()
IDS = ROWS.clamp(min=0)
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def model(folder: Path) -> BytelatentForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def to_the_right(rows: Tensor, mask: Tensor) -> Tensor:
    """Rows padded at their left instead."""
    pairs = zip(rows, mask.bool(), strict=True)
    return torch.stack([torch.cat([row[~is_real], row[is_real]]) for row, is_real in pairs])


def test_logits(model: BytelatentForCausalLM, blt: BLT) -> None:
    """Those of our own model, with padding on either side; the same again; as a tuple, too."""
    expected = blt.logits(ROWS)
    found = model(IDS, attention_mask=MASK)
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits.masked_fill(MASK[..., None] == 0, 0), expected, rtol=1e-5, atol=1e-5)
    left = model(to_the_right(IDS, MASK), attention_mask=to_the_right(MASK, MASK)).logits
    real, left_real = MASK.bool(), to_the_right(MASK, MASK).bool()
    torch.testing.assert_close(left[left_real], expected[real], rtol=1e-5, atol=1e-5)
    again = model(input_ids=IDS, attention_mask=MASK, return_dict=False)
    assert len(again) == 1
    assert torch.equal(again[0], found.logits)
    with torch.inference_mode():
        assert torch.equal(model(IDS, attention_mask=MASK).logits, found.logits)


def test_what_pads_does_not_matter(model: BytelatentForCausalLM) -> None:
    other = torch.where(MASK == 1, IDS, 77)
    assert torch.equal(model(IDS, attention_mask=MASK).logits, model(other, attention_mask=MASK).logits)


def test_loss(model: BytelatentForCausalLM) -> None:
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[0, :9] = -100  # a prompt
    found = model(IDS, attention_mask=MASK, labels=labels)
    logits, targets = found.logits[:, :-1].double(), labels[:, 1:]
    sums = [
        -float(logits[row, at].detach().log_softmax(-1)[targets[row, at]])
        for row in range(len(targets))
        for at in range(targets.shape[1])
        if targets[row, at] >= 0
    ]
    assert found.loss.item() == pytest.approx(sum(sums) / len(sums), rel=1e-6)
    shared = model(IDS, attention_mask=MASK, labels=labels, num_items_in_batch=torch.tensor(500))
    assert shared.loss.item() == pytest.approx(sum(sums) / 500, rel=1e-6)
    assert torch.equal(model(IDS, attention_mask=MASK, labels=labels, return_dict=False)[0], found.loss)
    left = model(to_the_right(IDS, MASK), attention_mask=to_the_right(MASK, MASK), labels=to_the_right(labels, MASK))
    assert left.loss.item() == pytest.approx(sum(sums) / len(sums), rel=1e-5)
    whole = [model(IDS, attention_mask=MASK, labels=each).loss for each in (IDS, IDS.masked_fill(MASK == 0, -100))]
    assert torch.equal(*whole)  # labels of padding do not count
    assert model(IDS, attention_mask=MASK, labels=torch.full_like(IDS, -100)).loss == 0
    ours = model.blt(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(found.loss, ours.loss)


def gradients(model: BytelatentForCausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_gradients(model: BytelatentForCausalLM, blt: BLT) -> None:
    """Every weight of the network has one, the entropy model's none; recomputed, they are the same."""
    found = gradients(model)
    names = {f"model.{name}" for name, _ in blt.model.named_parameters()}
    assert found.keys() == names == {name for name, _ in model.named_parameters()} == model.state_dict().keys()
    assert not any(weight.requires_grad for weight in model.blt.entropy_model.parameters())
    forwards = [part.forward for part in model.model.encoder.stack.blocks]
    model.train()
    checkpointing = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # 5, or 4
    checkpointing()
    assert model.gradient_checkpointing
    assert [part.forward for part in model.model.encoder.stack.blocks] != forwards
    torch.testing.assert_close(gradients(model), found, rtol=1e-5, atol=1e-7)
    model.enable_input_require_grads()
    for weight in model.get_input_embeddings().parameters():
        weight.requires_grad_(False)
    part = gradients(model)
    assert part.keys() == found.keys() - {"model.encoder.embedding.weight"}
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert not model.gradient_checkpointing
    assert [part.forward for part in model.model.encoder.stack.blocks] == forwards


def test_autocast_does_not_move_patches(model: BytelatentForCausalLM) -> None:
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(model.blt(IDS, attention_mask=MASK))
    assert torch.equal(found[0].entropies, found[1].entropies)
    assert torch.equal(found[0].starts, found[1].starts)
    assert not torch.equal(found[0].logits, found[1].logits)


def test_saved(model: BytelatentForCausalLM, blt: BLT, tmp_path: Path) -> None:
    """What is written is loaded by either, other files stay, and writing it again replaces it."""
    (tmp_path / "byte_lm").mkdir()
    (tmp_path / "byte_lm" / "config.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    with torch.no_grad():
        model.model.decoder.output.weight.mul_(1.5)
    expected = model(IDS, attention_mask=MASK).logits
    for _ in range(2):
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(blt.source or tmp_path).save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS, attention_mask=MASK).logits, expected)
        assert torch.equal(BLT.from_pretrained(tmp_path, device="cpu").logits(ROWS)[MASK == 1], expected[MASK == 1])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bytelatent", ["BytelatentForCausalLM"])
    assert config["dtype"] == "float32"
    model.save_pretrained(tmp_path / "not-here", is_main_process=False)
    assert not (tmp_path / "not-here").exists()


def test_weights_of_another_process(model: BytelatentForCausalLM, tmp_path: Path) -> None:
    """As a trainer gives them, who gathers them from several; and as it loads them to resume."""
    gathered = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    read = load_file(tmp_path / "model.safetensors")
    result = model.load_state_dict(read, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(dict(model.state_dict()), gathered, **EXACT)
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="unknown"):
        model.load_state_dict({**read, "unknown": torch.zeros(1)})


def test_what_was_trained_states_no_old_result(blt: BLT, tmp_path: Path) -> None:
    config = blt.config.with_origin(bits_per_byte=1.25, licence="mit")
    measured = BLT(copy.deepcopy(blt.model), config, blt.entropy_model)
    measured.save_pretrained(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "same")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same").config.origin["bits_per_byte"] == 1.25
    with torch.no_grad():
        model.model.decoder.output.weight.add_(0.1)
    model.save_pretrained(tmp_path / "other")
    origin = AutoModelForCausalLM.from_pretrained(tmp_path / "other").config.origin
    assert (origin["bits_per_byte"], origin["licence"]) == (None, "mit")


def test_precision(model: BytelatentForCausalLM, tmp_path: Path) -> None:
    """The network's; the entropy model keeps its own, to the last bit, and its device is the network's."""
    before = copy.deepcopy(model.blt.entropy_model.state_dict())
    model.to(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model.blt.entropy_model.state_dict(), before, **EXACT)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
    model.to("meta")
    assert model.device.type == "meta"


def test_modes(model: BytelatentForCausalLM) -> None:
    model.train()
    assert model.model.training
    assert not model.blt.entropy_model.training
    model.eval()
    assert not model.model.training


def test_a_copy_is_another(model: BytelatentForCausalLM) -> None:
    other = copy.deepcopy(model)
    assert other.blt.model is other.model
    assert other.blt is not model.blt
    with torch.no_grad():
        other.model.decoder.output.weight.zero_()
    assert other(IDS).logits.abs().max() == 0
    assert model(IDS).logits.abs().max() > 0


def test_embeddings(model: BytelatentForCausalLM) -> None:
    assert model.get_input_embeddings().weight.shape == (260, 16)
    assert model.get_output_embeddings().weight.shape == (260, 16)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert model.resize_token_embeddings(260) is model.get_input_embeddings()
    other = torch.nn.Embedding(260, 16)
    model.set_input_embeddings(other)
    assert model.blt.model.encoder.embedding is other


def test_refused(model: BytelatentForCausalLM) -> None:
    for call, word in (
        (lambda: model.resize_token_embeddings(300), "300"),
        (lambda: model(inputs_embeds=torch.zeros(1, 2, 16)), "give input_ids"),
        (lambda: model(), "input_ids"),
        (lambda: model(torch.tensor([[1, 300]])), "259"),
        (lambda: model(IDS, attention_mask=MASK[:, :3]), "attention_mask"),
        (lambda: model(IDS, labels=IDS[:, 1:]), "labels .* differ in shape"),
        (lambda: model(IDS, labels=IDS.float()), "^labels: ids are whole numbers"),
        (lambda: model(IDS, labels=IDS + 300), "^labels: ids are whole numbers"),
        (lambda: model(IDS, labels=IDS * 0 - 1), "^labels: ids are whole numbers"),
        (lambda: model(IDS, labels=IDS.tolist()), "^forward: labels is a tensor"),
        (lambda: model.generate(IDS, attention_mask=MASK * 0.5), "^generate: attention_mask holds 0.5"),
        (lambda: model._replicate_for_data_parallel(), "torchrun"),
    ):
        with pytest.raises(UserError, match=word):
            call()


def test_states(model: BytelatentForCausalLM) -> None:
    """The states that trainers make logits of, and the decoder's states and weights by transformers' names."""
    found = model(IDS, attention_mask=MASK, output_hidden_states=True, output_attentions=True)
    whole = model.blt(IDS, attention_mask=MASK, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(found.hidden_states, whole.hidden_states.decoder, **EXACT)
    torch.testing.assert_close(found.attentions, whole.attentions.decoder, **EXACT)
    assert len(found.hidden_states) == model.config.model["decoder"]["num_layers"] + 1
    last = model.base_model(IDS, attention_mask=MASK, use_cache=False).last_hidden_state
    logits = F.linear(last, model.get_output_embeddings().weight)
    torch.testing.assert_close(logits[MASK == 1], found.logits[MASK == 1])
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == len(found.hidden_states)


def test_packed_texts(model: BytelatentForCausalLM) -> None:
    """Several texts in a row, with padding at its end: each as if it were alone, in logits, states and loss."""
    sizes = [int(row.sum()) for row in MASK]
    texts = [row[:size] for row, size in zip(IDS, sizes, strict=True)]
    ids = torch.zeros(2, 70, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    places = [(0, 0), (0, 30), (1, 0), (1, 30)]
    for (row, at), text in zip(places, texts, strict=True):
        ids[row, at : at + len(text)], mask[row, at : at + len(text)] = text, 1
        positions[row, at : at + len(text)] = torch.arange(len(text))
    labels = ids.masked_fill(mask == 0, -100)
    found = model(ids, attention_mask=mask, position_ids=positions, labels=labels)
    nats, count = 0.0, 0
    for (row, at), text in zip(places, texts, strict=True):
        alone = model(text[None], labels=text[None])
        torch.testing.assert_close(found.logits[row, at : at + len(text)], alone.logits[0], rtol=1e-5, atol=1e-5)
        nats, count = nats + alone.loss.item() * (len(text) - 1), count + len(text) - 1
    assert found.loss.item() == pytest.approx(nats / count, rel=1e-6)
    last = model.base_model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    logits = F.linear(last, model.get_output_embeddings().weight)
    torch.testing.assert_close(logits[mask == 1], found.logits[mask == 1])
    flat, flat_positions = ids[mask == 1][None], positions[mask == 1][None]
    torch.testing.assert_close(model(flat, position_ids=flat_positions).logits[0], found.logits[mask == 1])
    for wrong, more in ((positions + 1, {}), (positions[:, :3], {}), (positions, {"output_attentions": True})):
        with pytest.raises(UserError, match="position_ids"):
            model(ids, attention_mask=mask, position_ids=wrong, **more)


def test_made_elsewhere(model: BytelatentForCausalLM, blt: BLT) -> None:
    """Without values on the device `meta`, and by pickle, as processes hand models on."""
    with torch.device("meta"):
        empty = BytelatentForCausalLM(model.config)
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.blt.entropy_model.load_state_dict(blt.entropy_model.state_dict(), assign=True)
    assert torch.equal(empty(IDS).logits, model(IDS).logits)
    again = pickle.loads(pickle.dumps(model))
    assert again.blt.model is again.model
    assert torch.equal(again(IDS).logits, model(IDS).logits)
