"""Training that begins from a model: what is taken over, where it starts, what of it stays as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_text import evaluate_models
from bytelatent.errors import UserError
from bytelatent.text import read_documents
from bytelatent.text.chat import CHAT_TEMPLATE, DEFAULT
from bytelatent.text.tokenizer import TOKENIZER, train_tokenizer
from bytelatent.training import read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.settings import TrainSettings
from bytelatent.weights import StoredModel, convert, fingerprint, load, load_byte_lm, open_pretrained, write_model
from tests.hub_server import HubServer
from tests.training.crew import Crew
from tests.training.plans import PLANS, take_steps, train_as
from tests.training.tiny_runs import (
    STACK,
    assert_equal_runs,
    blt_run,
    byte_lm_run,
    checkpoints,
    losses,
    settings,
    weights,
    write_text,
)
from tests.weights.published import write_published

FORMATS = ("run", "native", "hf", "meta")
CONTEXT = 64


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text unlike what the models were trained on."""
    path = write_text(tmp_path_factory.mktemp("other") / "other.jsonl", seed=1, num_documents=30)
    path.write_text(path.read_text().upper().replace("TEXT", "text"))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, text: Path, byte_lm: Path) -> dict[str, Path]:
    """One BLT in all formats."""
    folder = tmp_path_factory.mktemp("sources")
    found = {"run": train(settings(blt_run(folder / "run", text, byte_lm, steps=5)))}
    (found["run"] / "LICENSE").write_text("do what you like")
    (found["run"] / CHAT_TEMPLATE).write_text(DEFAULT)
    for name in FORMATS[1:]:
        found[name] = folder / name
        convert(open_pretrained(found["run"]), found[name], name)
    return found


def from_model(run: Path, text: Path, source: Path | str, steps: int = 4, **more: Any) -> dict[str, Any]:
    """The values of a run that begins from a model, and names nothing of it."""
    own = {"init": str(source), "optimizer": {"lr": 1e-3, "warmup_steps": 0}, "validation": {"every": 100}}
    data = {"batch_bytes": 4096, **more.pop("data", {})}  # all of the held-out text is one batch, so no piece is cut
    found = byte_lm_run(run, text, steps, **{**own, **more, "data": data})
    return found if "model" in more else {key: value for key, value in found.items() if key != "model"}


@pytest.fixture
def initial(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights as the last run started."""
    found: dict[str, Tensor] = {}

    def record(state: Any, *rest: Any) -> None:
        found.clear()
        found.update({name: weight.detach().clone() for name, weight in state.model.named_parameters()})

    monkeypatch.setattr(loop, "must_be_finite", record)
    return found


def held_out_at_the_start(run: Path) -> float:
    [row] = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] == 0]
    return row["validation_bits_per_byte"]


def evaluated(model: Path | str, text: Path, context: int = CONTEXT) -> float:
    """What `blt eval` says."""
    how = {"text": [str(text)], "model": [str(model)], "context": context, "overlap": 0, "device": "cpu"}
    return evaluate_models(EvaluateSettings.parse({**how, "resamples": 10}))["bits_per_byte"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_start_is_the_source(
    format: str, sources: dict[str, Path], initial: dict[str, Tensor], other_text: Path, tmp_path: Path
) -> None:
    source = load(sources[format])
    run = train(settings(from_model(tmp_path / "run", other_text, sources[format], 1, data={"valid": str(other_text)})))
    theirs = source.model.state_dict()
    assert initial.keys() == theirs.keys()
    assert all(torch.equal(initial[name], theirs[name].float()) for name in theirs)
    assert held_out_at_the_start(run) == pytest.approx(evaluated(sources[format], other_text), rel=1e-6)
    found = load(run)
    assert (found.config.model, found.config.patching) == (source.config.model, source.config.patching)
    assert found.config.calibration == source.config.calibration
    assert found.byte_lm is not None
    assert source.byte_lm is not None
    assert fingerprint(found.byte_lm) == fingerprint(source.byte_lm)
    assert found.config.origin.trained_from == str(sources[format])
    assert (run / "LICENSE").read_text() == "do what you like"
    assert (run / CHAT_TEMPLATE).read_text() == DEFAULT


def test_a_byte_lm(whole: Path, initial: dict[str, Tensor], other_text: Path, tmp_path: Path) -> None:
    run = train(settings(from_model(tmp_path / "run", other_text, whole, 12, data={"valid": str(other_text)})))
    assert all(torch.equal(initial[name], value) for name, value in load(whole).model.state_dict().items())
    before, after = losses(run)[0][3], losses(run)[-1][3]
    assert before is not None
    assert after is not None
    assert before == pytest.approx(evaluated(whole, other_text), rel=1e-6)
    assert after < before - 0.2  # new text is learned


def test_released_weights_of_the_hub(
    goldens: Path, initial: dict[str, Tensor], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `facebook/blt-1b`: bfloat16 or float32, with the entropy model in a repository of its own."""
    with HubServer() as hub:
        for name, golden in (("published/blt-1b", "blt_k2"), ("published/blt-entropy", "entropy")):
            place = write_published(goldens / golden, tmp_path / name)
            (place / "LICENSE").write_text(f"the licence of {name}")
            hub.add(name, place, kind="model")
        hub.connect(monkeypatch, tmp_path / "home")
        values = from_model(tmp_path / "run", text, "published/blt-1b", 1, data={"batch_bytes": 128})
        asked = settings(values)
        assert not [what for what in hub.requests if what.endswith((".safetensors", ".pth"))]
        run = train(asked)
        expected = load("published/blt-1b")
    assert all(torch.equal(initial[name], value.float()) for name, value in expected.model.state_dict().items())
    assert (run / "LICENSE").read_text() == "the licence of published/blt-1b"
    assert open_pretrained(run).config.origin.licence == "see LICENSE"
    values["steps"] = 2  # the hub is gone
    assert [row[0] for row in losses(train(settings(values)))] == [1, 2]


def test_resumes_exactly_without_the_source(
    sources: dict[str, Path], other_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(sources["native"], tmp_path / "source"))
    more: dict[str, Any] = {"data": {"valid": str(other_text)}, "checkpoint": {"every": 2}}
    more["optimizer"] = {"lr": 1e-3, "warmup_steps": 0, "lr_scale": {"encoder": 0.0, "decoder": 0.1}}
    whole = train(settings(from_model(tmp_path / "whole", other_text, source, 6, **more)))
    values = from_model(tmp_path / "cut", other_text, source, 6, **more)
    inner, calls = loop.learning_rate, []

    def rate(step: int, *rest: Any) -> float:
        calls.append(step)
        if step == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return inner(step, *rest)

    monkeypatch.setattr(loop, "learning_rate", rate)
    with pytest.raises(KeyboardInterrupt):
        train(settings(values))
    assert checkpoints(tmp_path / "cut") == ["step-00000002"]
    shutil.rmtree(source)
    cut = train(settings(values))
    assert_equal_runs(cut, whole)
    assert load(cut).config.origin == load(whole).config.origin
    moved = cut.rename(tmp_path / "moved")
    assert TrainSettings.parse(json.loads(json.dumps(settings(values | {"run": str(moved)}).plain()))).init
    with pytest.raises(UserError, match="begun with other settings"):
        train(settings(values | {"run": str(moved), "model": {"encoder": {"window": 16}}}))


@pytest.mark.parametrize(
    ("named", "line"),
    [
        ({"model": {"encoder": {"window": 16}}}, "model.encoder.window: it is 16, and that of init='.*' is 32; leave"),
        ({"model": {"cross_attention": None}}, r"model.cross_attention: it is null, and .* is \{"),
        ({"model": {"kind": "byte_lm"}}, 'model.kind: it is "byte_lm", and that of init=.* is "blt"'),
        ({"model": "demo-blt"}, "model.encoder.dim: it is 128, and that of init=.* is 16"),
        ({"patching": {"mode": "space"}}, 'patching.mode: it is "space", and .* "entropy"; leave it out'),
        ({"patching": {"threshold": 1.5}}, "patching.threshold: it is 1.5, .* on your text: calibration.patch_bytes"),
        ({"model": {"encoder": {"windw": 16}}}, "windw: unknown key; did you mean 'window'"),
        ({"init": "nowhere"}, "init: 'nowhere' is not a folder; name a run"),
        ({"init": ""}, "init: the path is empty; name a run"),
        ({"optimizer": {"lr_scale": dict.fromkeys(
            ("byte_embedding", "hash_tables", "encoder", "global_transformer", "decoder"), 0.0
        )}}, "lr_scale: 0 freezes a part, and here all of them"),
    ],
)  # fmt: skip
def test_what_differs_is_named(
    named: dict[str, Any], line: str, sources: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line):
        train(settings(from_model(tmp_path / "run", text, sources["native"], **named)))


def test_what_is_the_same_may_be_named(
    sources: dict[str, Path], byte_lm: Path, whole: Path, text: Path, tmp_path: Path
) -> None:
    own = load(sources["native"]).config
    assert own.patching is not None
    values = from_model(
        tmp_path / "run", text, sources["native"], 1,
        model=own.model.plain(), patching=own.patching.plain(), entropy_model=str(byte_lm),
    )  # fmt: skip
    assert load(train(settings(values))).config.patching == own.patching
    other = train(settings(byte_lm_run(tmp_path / "lm", text, 1)))
    values |= {"run": str(tmp_path / "other"), "entropy_model": str(other)}
    with pytest.raises(UserError, match=r"entropy_model: '.*lm' \(fingerprint .* is not the entropy model of init="):
        train(settings(values))
    # Another threshold, chosen on the new text.
    more = {"calibration": {"patch_bytes": 3.0, "text_bytes": 2000}}
    asked = settings(from_model(tmp_path / "calibrated", text, sources["native"], 1, **more))
    found = load(train(asked)).config
    assert found.patching is not None
    assert found.calibration is not None
    assert found.patching.threshold == found.calibration.threshold != own.patching.threshold
    assert found.calibration.wanted_patch_bytes == 3.0
    assert asked.source_of_default("model.encoder.window") == f"init {sources['native']}"


PARTS = {
    "byte_embedding": "encoder.embedding.",
    "hash_tables": "encoder.ngram_hash.",
    "encoder": "encoder.",
    "global_transformer": "global_transformer.",
    "decoder": "decoder.",
}


def is_of(name: str, parts: set[str]) -> bool:
    """Whether a weight is of one of these parts."""
    return next(part for part, begin in PARTS.items() if name.startswith(begin)) in parts


@pytest.mark.parametrize(
    ("frozen", "optimizer"),
    [
        ({"encoder", "global_transformer"}, {"name": "muon"}),
        ({"hash_tables"}, {"hash_gradients": "rows"}),
        ({"byte_embedding", "encoder", "global_transformer", "decoder"}, {"hash_gradients": "rows"}),
        ({"byte_embedding", "hash_tables", "encoder"}, {"name": "muon"}),
    ],
)
def test_frozen_parts_stay_bit_for_bit(
    frozen: set[str], optimizer: dict[str, Any], sources: dict[str, Path], other_text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kept: list[Any] = []
    inner = loop.clip

    def clip(parameters: Any, *rest: Any) -> Tensor:
        parameters = list(parameters)
        kept.append({id(p) for p in parameters if p.grad is not None})
        return inner(parameters, *rest)

    states: list[Any] = []
    inner_build = loop.build_optimizer

    def build(model: Any, asked: Any) -> Any:
        states.append((dict(model.named_parameters()), inner_build(model, asked)))
        return states[-1][1]

    monkeypatch.setattr(loop, "clip", clip)
    monkeypatch.setattr(loop, "build_optimizer", build)
    asked = {"lr": 1e-2, "warmup_steps": 0, "lr_scale": dict.fromkeys(frozen, 0.0), **optimizer}
    run = train(settings(from_model(tmp_path / "run", other_text, sources["native"], 3, optimizer=asked)))
    before, after = load(sources["native"]).model.state_dict(), weights(run)
    [(parameters, made)] = states
    for name, parameter in parameters.items():
        assert torch.equal(before[name], after[name]) == is_of(name, frozen), name
        assert all((id(parameter) in step) != is_of(name, frozen) for step in kept), name
    owned = {id(p) for group in made.param_groups for p in group["params"]}
    assert owned == {id(p) for name, p in parameters.items() if not is_of(name, frozen)}


def test_a_part_at_a_tenth_of_the_rate(sources: dict[str, Path], other_text: Path, tmp_path: Path) -> None:
    """In one step of AdamW a weight with a gradient moves by about its rate, whatever the gradient."""
    asked = {"lr": 1e-2, "warmup_steps": 0, "weight_decay": 0.0, "lr_scale": {"global_transformer": 0.1}}
    run = train(settings(from_model(tmp_path / "run", other_text, sources["native"], 1, optimizer=asked)))
    before, after = load(sources["native"]).model.state_dict(), weights(run)
    for part, scale in (("global_transformer.stack.blocks.0.feed_forward.up", 0.1), ("decoder.output", 1)):
        name = f"{part}.weight"
        moved = (after[name] - before[name]).abs().max()
        assert float(moved) == pytest.approx(1e-2 * scale, rel=0.05)


def test_processes_train_as_one(crew: Crew, sources: dict[str, Path], other_text: Path, tmp_path: Path) -> None:
    """The same batches, divided by FSDP and by tensor parallelism, with two parts frozen."""
    frozen = {"encoder", "hash_tables"}
    more: dict[str, Any] = {
        "data": {"valid": str(other_text)},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "clip": 1e9, "lr_scale": dict.fromkeys(frozen, 0.0)},
        "patching": {"mode": "entropy"},
    }
    values = from_model(tmp_path / "run", other_text, sources["meta"], 4, **more)
    expected = take_steps(values)
    jobs = [(2, take_steps, {**values, "parallel": PLANS[name][1]}) for name in ("shard", "tensor")]
    source = load(sources["meta"]).model.state_dict()
    for [found, _] in crew.run(*jobs):
        for name, value in source.items():
            assert torch.equal(found.initial[name], value)
            assert torch.equal(found.weights[name], value) == is_of(name, frozen), name
            torch.testing.assert_close(found.weights[name], expected.weights[name], rtol=1e-3, atol=2e-5)
        for row, wanted in zip(found.rows, expected.rows, strict=True):
            assert row["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-5)
            assert row["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-4)
    run = tmp_path / "whole"
    crew.run((2, train_as, {**values, "run": str(run)}))  # the command itself
    assert held_out_at_the_start(run) == pytest.approx(evaluated(sources["meta"], other_text), rel=1e-6)
    assert all(torch.equal(weights(run)[name], value) == is_of(name, frozen) for name, value in source.items())


def test_a_token_lm(tmp_path: Path, text: Path, other_text: Path, initial: dict[str, Tensor]) -> None:
    tokenizer = tmp_path / TOKENIZER
    tokenizer.write_text(train_tokenizer((document.text for _, document in read_documents(str(text))), 300))
    model = {"kind": "token_lm", **STACK, "vocab_size": 320}
    of_text = {"tokenizer": str(tokenizer), "context": 24}
    source = train(settings(byte_lm_run(tmp_path / "source", text, 3, model=model, data=of_text)))
    tokenizer.unlink()
    data = {"valid": str(other_text), "context": 24}
    values = from_model(tmp_path / "run", other_text, source, 2, data=data)
    run = train(settings(values))
    assert all(torch.equal(initial[name], value) for name, value in load(source).model.state_dict().items())
    assert held_out_at_the_start(run) == pytest.approx(evaluated(source, other_text, 24), rel=1e-6)
    source.rename(tmp_path / "gone")
    assert [row[0] for row in losses(train(settings(values | {"steps": 3})))] == [0, 1, 2, 2, 3, 3]


def test_a_byte_lm_in_bfloat16(sources: dict[str, Path], other_text: Path, tmp_path: Path) -> None:
    """It finds patches in float32, in training as in evaluation; its copy is the run's own from then on."""
    stored = open_pretrained(sources["native"])
    assert stored.byte_lm is not None
    found = stored.byte_lm.load().model.bfloat16()
    narrow = replace(stored, byte_lm=StoredModel.of(found, stored.byte_lm.config, None))
    write_model(narrow, tmp_path / "narrow", "native")
    values = from_model(tmp_path / "run", other_text, tmp_path / "narrow", 1, data={"valid": str(other_text)})
    run = train(settings(values))
    assert load_byte_lm(run / "byte_lm").output.weight.dtype == torch.float32
    assert fingerprint(load_byte_lm(run / "byte_lm")) == fingerprint(found)
    assert held_out_at_the_start(run) == pytest.approx(evaluated(tmp_path / "narrow", other_text), rel=1e-6)
