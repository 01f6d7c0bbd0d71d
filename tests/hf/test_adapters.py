"""PEFT's LoRA: targets by name, nothing in the entropy model, merged and exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BltForCausalLM
from trl import SFTConfig, SFTTrainer

from bytelatent import BLT
from bytelatent.hf import BytelatentForCausalLM, BytelatentTokenizer
from tests.hf.test_training import COMMON, TEXTS
from tests.weights.test_hugging_face import random_rows

ROWS = random_rows(0)
IDS, MASK = ROWS.clamp(min=0), (ROWS >= 0).long()
tokenizer = BytelatentTokenizer()


def lora(targets: str | list[str], **more: object) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False, **more)


@pytest.fixture
def model(folder: Path) -> BytelatentForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
def test_adapters(model: BytelatentForCausalLM, blt: BLT, targets: str | list[str], tmp_path: Path) -> None:
    before = logits(model)
    adapted = get_peft_model(model, lora(targets))
    names = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    assert not any("lora" in name for name, _ in model.blt.entropy_model.named_parameters())
    num_linear = sum(isinstance(part, torch.nn.Linear) for part in blt.model.modules())
    if targets == "all-linear":  # but for the output
        assert len(names) == 2 * (num_linear - 1)
    changed = logits(adapted)
    assert not torch.allclose(changed, before, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)

    given = tokenizer(["The history", "a"], padding=True, return_tensors="pt")
    text = adapted.generate(**given, max_new_tokens=10)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model.name_or_path), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), changed)
    by_name = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(by_name), changed)

    merged = adapted.merge_and_unload()
    assert type(merged) is BytelatentForCausalLM
    print(changed.abs().max())
    torch.testing.assert_close(logits(merged), changed, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(**given, max_new_tokens=10), text)
    merged.save_pretrained(tmp_path / "ours")
    merged.blt.save_pretrained(tmp_path / "theirs", format="hf")
    assert torch.equal(
        BLT.from_pretrained(tmp_path / "ours", device="cpu").logits(ROWS)[MASK == 1], logits(merged)[MASK == 1]
    )
    theirs = BltForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    row = IDS[:1]
    torch.testing.assert_close(theirs(row, use_cache=False).logits, merged(row).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["output", "embedding"]}])
def test_recomputed_activations(model: BytelatentForCausalLM, more: dict[str, Any]) -> None:
    """Gradients are those without them, and only of what is trained."""
    adapted = get_peft_model(model, lora("all-linear", **more)).train()
    found = []
    for how in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        if how is not None:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(how)
        adapted.zero_grad()
        adapted(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        found.append({name: each.grad for name, each in adapted.named_parameters() if each.grad is not None})
    assert found[0].keys() == {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    for recomputed in found[1:]:
        torch.testing.assert_close(recomputed, found[0], rtol=1e-4, atol=1e-6)


def test_training(model: BytelatentForCausalLM, tmp_path: Path) -> None:
    """By TRL, with recomputed activations: only adapters learn."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), **COMMON, max_steps=6, save_strategy="no", gradient_checkpointing=True
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=BytelatentTokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["query", "key", "value", "gate", "up", "down"]),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in trainer.model.state_dict().items()
        if "lora_" not in name
    }
    torch.testing.assert_close(base, before, rtol=0, atol=0)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
