"""Training on conversations: what counts, over batches and ranks; and the template that goes with the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent import BLT
from bytelatent.commands.export import export_checkpoint
from bytelatent.data import Loader, Patcher, batches_once
from bytelatent.errors import UserError
from bytelatent.model import build_model
from bytelatent.model.loss import bits_per_byte, cross_entropy
from bytelatent.patching import PatchSettings
from bytelatent.text.chat import CHAT_TEMPLATE, DEFAULT_TEMPLATE, ChatTemplate
from bytelatent.training import read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.parallelize import ParallelPlan
from bytelatent.training.gradients import Gradients
from bytelatent.training.optimizer import build_optimizer
from bytelatent.weights import load
from tests.training.crew import Crew
from tests.training.plans import PLANS, take_steps, values
from tests.training.tiny_runs import BLT as MODEL
from tests.training.tiny_runs import byte_lm_run, losses, settings, weights

SHORT = ChatTemplate(
    "{% for m in messages %}{{ m.role[0] + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of very different lengths, so that batches differ in what counts."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    said = [("what is it " * (1 + i % 3), "a cat " * (1 + i % 7 * (i % 5 == 0) * 3)) for i in range(40)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in said]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_chats(chats: Path, **more: Any) -> dict[str, Any]:
    source = {"path": str(chats), "format": "chat"}
    return {"train": [source], "context": 200, "batch_bytes": 256, "shuffle_buffer": 8, **more}


def chat_run(run: Path, chats: Path, **more: Any) -> dict[str, Any]:
    data = of_chats(chats, valid=[{"path": str(chats), "format": "chat"}], **more.pop("data", {}))
    own = {"model": MODEL, "patching": {"mode": "space"}, "data": data, "steps": 6, "validation": {"every": 6}}
    return byte_lm_run(run, chats, **{**own, **more})


def test_what_counts_is_counted_over_all_batches(chats: Path) -> None:
    """The gradient of a step is that of the mean over the bytes that count in all its batches."""
    asked = settings(chat_run(Path("x"), chats, optimizer={"lr": 1e-3, "accumulation": 3, "clip": 1e9}))
    model = build_model(asked.model)
    patcher = Patcher(PatchSettings(mode="space"))
    batches = [next(loader) for loader in [Loader(asked.data, 0, patcher)] for _ in range(3)]
    counts = [batch.num_targets for batch in batches]
    assert len(set(counts)) > 1
    torch.stack([cross_entropy(model, batch) / sum(counts) for batch in batches]).sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    with torch.no_grad():
        nats = sum(float(cross_entropy(model, batch)) for batch in batches)
    model.zero_grad(set_to_none=True)
    state = TrainState(model, build_optimizer(model, asked.optimizer), Loader(asked.data, 0, patcher))
    found: dict[str, torch.Tensor] = {}
    state.optimizer.register_step_pre_hook(  # pyright: ignore[reportAttributeAccessIssue]
        lambda *_: found.update({n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None})
    )
    gradients = Gradients(lambda batch: cross_entropy(model, batch), torch.device("cpu"))
    row = loop.Trainer(asked, ParallelPlan(), state, gradients).train_step()
    assert row["bits_per_byte"] == pytest.approx(bits_per_byte(nats, sum(b.target_bytes for b in batches)), rel=1e-6)
    assert row["bytes_seen"] == sum(batch.num_bytes for batch in batches) > sum(counts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_two_processes_are_one(crew: Crew, text: Path, chats: Path) -> None:
    asked = values(text, data=of_chats(chats), parallel=PLANS["replicate"][1])
    alone = take_steps({**asked, "parallel": {}}, steps=2)
    [ranks] = crew.run((2, take_steps, asked, 2))
    for rank in ranks:
        for row, expected in zip(rank.rows, alone.rows, strict=True):
            assert row["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=2e-6)
        for name, expected in alone.gradients.items():
            torch.testing.assert_close(
                rank.gradients[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name
            )


def test_a_run(tmp_path: Path, chats: Path) -> None:
    """It is the same when it was interrupted, keeps its template, and is validated on what the assistant says."""
    (tmp_path / "short.jinja").write_text(SHORT.source)
    optimizer = {"lr": 3e-3, "warmup_steps": 3, "final_lr_ratio": 1.0}
    own: dict[str, Any] = {"data": {"chat_template": str(tmp_path / "short.jinja")}, "optimizer": optimizer}
    whole = train(settings(chat_run(tmp_path / "whole", chats, **own)))
    train(settings(chat_run(tmp_path / "cut", chats, steps=5, **own)))
    (tmp_path / "short.jinja").write_text(DEFAULT_TEMPLATE.source)
    with pytest.raises(UserError, match=r"data.chat_template: .* is not the one that"):
        train(settings(chat_run(tmp_path / "cut", chats, **own)))
    (tmp_path / "short.jinja").unlink()  # the run has a copy
    cut = train(settings(chat_run(tmp_path / "cut", chats, **own)))
    assert losses(cut)[-1] == losses(whole)[-1]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(cut).items())
    assert BLT.from_pretrained(whole, device="cpu").chat_template == SHORT
    exported = export_checkpoint(str(whole), None, str(tmp_path / "exported"))
    assert (exported / CHAT_TEMPLATE).read_text() == SHORT.source
    found = load(exported)
    valid = settings(chat_run(whole, chats)).data.valid
    batches = list(batches_once(valid, 200, 256, Patcher(PatchSettings(mode="space")), chat_template=SHORT))
    with torch.no_grad():
        nats = sum(float(cross_entropy(found.model, batch)) for batch in batches)
    num_bytes = sum(len(json.loads(row)["messages"][1]["content"]) + 1 for row in chats.read_text().splitlines())
    row = next(row for row in read_metrics(whole / "metrics.jsonl") if "validation_bytes" in row)
    assert row["validation_bytes"] == num_bytes == sum(batch.target_bytes for batch in batches)
    assert row["validation_bits_per_byte"] == pytest.approx(bits_per_byte(nats, num_bytes), rel=1e-5)


def test_a_template_that_is_not_there(tmp_path: Path, chats: Path) -> None:
    with pytest.raises(UserError, match=r"data.chat_template: 'none' does not exist"):
        train(settings(chat_run(tmp_path / "run", chats, data={"chat_template": "none"})))
