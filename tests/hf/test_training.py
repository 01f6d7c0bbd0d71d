"""transformers' Trainer and TRL's, unchanged, and what they leave behind."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)
from trl import SFTConfig, SFTTrainer

from bytelatent import BLT
from bytelatent.hf import BytelatentForCausalLM, BytelatentTokenizer

TEXTS = ["the cat sat on the mat", "a dog", "the bird sang in the tree", "été \u6f22"] * 4
CHAT = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
COMMON: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 0,
}


@pytest.fixture
def model(folder: Path) -> BytelatentForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def rows(tokenizer: BytelatentTokenizer) -> Dataset:
    return Dataset.from_dict({"text": TEXTS}).map(lambda row: tokenizer(row["text"]), remove_columns=["text"])


def trainer_of(model: Any, out: Path, **changes: Any) -> Trainer:
    tokenizer = BytelatentTokenizer(add_eos_token=True)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **{**COMMON, "max_steps": 6, "save_steps": 3, **changes}),
        train_dataset=rows(tokenizer),
        eval_dataset=rows(tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_trainer(model: BytelatentForCausalLM, folder: Path, blt: BLT, tmp_path: Path) -> None:
    """It learns, resumes to the same weights, and leaves models that either side loads."""
    trainer = trainer_of(model, tmp_path / "whole")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3
    torch.testing.assert_close(model.blt.entropy_model.state_dict(), blt.entropy_model.state_dict(), rtol=0, atol=0)

    resumed = AutoModelForCausalLM.from_pretrained(folder)
    again = trainer_of(resumed, tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    torch.testing.assert_close(dict(resumed.state_dict()), dict(model.state_dict()), rtol=1e-6, atol=1e-7)

    trainer.save_model(str(tmp_path / "whole"))  # beside its checkpoints
    ids = torch.from_numpy(BytelatentTokenizer()("the", return_tensors="np")["input_ids"])
    for place in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-6"):
        assert torch.equal(BLT.from_pretrained(place, device="cpu").logits(ids), model(ids).logits)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(place)(ids).logits, model(ids).logits)
        assert AutoTokenizer.from_pretrained(place)("a").input_ids == [1, 101, 2]


def test_first_loss(folder: Path, tmp_path: Path) -> None:
    """The loss that it logs is the mean over all bytes of a step, however they are divided into batches."""
    for batch, accumulation in ((16, 1), (2, 8)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(model, tmp_path, max_steps=1, save_strategy="no", **changes)
        nats, count = 0.0, 0
        for ids in trainer.train_dataset["input_ids"]:
            row = torch.tensor([ids])
            logits = model.blt.logits(row)[0, :-1].double()
            nats -= float(logits.log_softmax(-1).gather(1, row[0, 1:, None]).sum())
            count += len(ids) - 1
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(nats / count, rel=1e-3)


def test_settings_of_a_large_run(model: BytelatentForCausalLM, tmp_path: Path) -> None:
    """bfloat16 by autocast, recomputed activations, and accumulated gradients."""
    changes = {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = trainer_of(model, tmp_path, **changes)
    trainer.train()
    assert model.dtype == torch.float32
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3


def test_supervised_on_texts(model: BytelatentForCausalLM, tmp_path: Path) -> None:
    """TRL adds the end of a text by its name, which is EOS here and no five bytes."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), **COMMON, max_steps=4, save_strategy="no", max_length=32),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=BytelatentTokenizer(),
    )
    assert list(trainer.train_dataset[1]["input_ids"]) == [1, *(byte + 4 for byte in b"a dog"), 2]
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_packed_training(folder: Path, tmp_path: Path) -> None:
    """TRL packs texts into rows; the loss of the first step is that without packing."""
    found = []
    for packing in (False, True):
        args = SFTConfig(
            output_dir=str(tmp_path),
            **COMMON | {"per_device_train_batch_size": 16, "bf16": False},
            max_steps=1,
            save_strategy="no",
            packing=packing,
            max_length=60,
        )
        trainer = SFTTrainer(
            model=str(folder),
            args=args,
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=BytelatentTokenizer(),
        )
        assert (len(trainer.train_dataset) < len(TEXTS)) == packing
        trainer.train()
        found.append(losses(trainer)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_supervised_on_chats(folder: Path, tmp_path: Path) -> None:
    """By the name of a model's folder, as TRL's own scripts do it; only what the prompt does not hold is learned."""
    tokenizer = BytelatentTokenizer(chat_template=CHAT)
    chats = [
        {"prompt": [{"role": "u", "content": "hi"}], "completion": [{"role": "a", "content": text}]} for text in TEXTS
    ]
    trainer = SFTTrainer(
        model=str(folder),
        args=SFTConfig(output_dir=str(tmp_path), **COMMON, max_steps=2, save_strategy="no"),
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert {text.removeprefix("a:").removesuffix(tokenizer.eos_token) for text in learned} <= set(TEXTS)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_preferences(model: BytelatentForCausalLM, tmp_path: Path) -> None:
    """TRL's `DPOTrainer` begins with the loss of a coin, ln 2, as the model and its reference agree; then it learns."""
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": "the ", "chosen": text, "rejected": text[::-1]} for text in TEXTS]
    args = DPOConfig(output_dir=str(tmp_path), **COMMON | {"bf16": False}, max_steps=4, save_strategy="no")
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=BytelatentTokenizer()
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(trainer)[-1] < 0.6


def test_pipeline(folder: Path, blt: BLT) -> None:
    write = pipeline("text-generation", model=str(folder), device="cpu")
    [found] = write("The history", max_new_tokens=12, do_sample=False, return_full_text=False)
    assert found["generated_text"] == blt.generate("The history", max_new_bytes=12, temperature=0)
    many = write(["a", "The history"], max_new_tokens=12, do_sample=False, batch_size=2, return_full_text=False)
    assert many[1] == [found]
