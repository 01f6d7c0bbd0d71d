"""TRL's trainer on conversations: the bytes that it counts are those that our own training counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent import BLT
from bytelatent.data import DataSettings, batches_once
from bytelatent.hf import BytelatentForCausalLM, BytelatentTokenizer
from bytelatent.model.loss import cross_entropy
from bytelatent.text.chat import DEFAULT_TEMPLATE

ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "system", "content": "Be kind."}, *talk]}
        for talk in (
            [{"role": "user", "content": "Hi\x03 <|end|>"}, {"role": "assistant", "content": "Hello, é!"}],
            [
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "so"},
                {"role": "user", "content": "what"},
                {"role": "assistant", "content": "nothing"},
            ],
        )
    ],
    "completion": [
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "not this"},
                {"role": "user", "content": "b"},
            ],
            "completion": [{"role": "assistant", "content": "but this"}],
        },
        {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]},
    ],
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_same_bytes_count(kind: str, blt: BLT, tmp_path: Path) -> None:
    """So the loss of TRL's trainer is that of ours."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = ROWS[kind]
    blt.chat_template = DEFAULT_TEMPLATE
    blt.save_pretrained(tmp_path / "model")
    blt.chat_template = None
    tokenizer = BytelatentTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == DEFAULT_TEMPLATE.source
    own = {"assistant_only_loss": kind == "messages", "report_to": "none", "use_cpu": True, "bf16": False}
    args = SFTConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, **own)
    model = BytelatentForCausalLM.from_pretrained(tmp_path / "model")
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    given = next(iter(trainer.get_train_dataloader()))
    theirs = sorted(
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for ids, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"], strict=True)
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = DataSettings.parse({"train": {"path": str(tmp_path / "rows.jsonl"), "format": "chat"}}).train
    [batch] = batches_once(train, 1000, 4000, blt.patcher)
    stream, ours = batch.stream, []
    for document in range(2):
        its = stream.document == document
        ours.append((stream.ids[its].tolist(), [-100, *batch.targets[its].tolist()[:-1]]))
    assert theirs == sorted(ours)
    with torch.no_grad():
        mean = cross_entropy(blt.model, batch) / batch.num_targets
        loss = trainer.compute_loss(model, given)
    torch.testing.assert_close(loss, mean, rtol=1e-5, atol=1e-6)
