"""What all results of a study depend on is the same at each start, whatever is left to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.errors import UserError
from bytelatent.study.basis import BASIS, Basis
from bytelatent.study.plan import load_plan
from bytelatent.study.run import StudyOptions, planned_runs, run_study
from bytelatent.weights import Config, fingerprint, load_byte_lm, save
from tests.study.study_plans import PLAN, write_plan, write_texts
from tests.training.tiny_runs import BYTE_LM


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Path:
    """A study whose shared parts are made."""
    folder = tmp_path_factory.mktemp("prepared") / "study"
    run_study(write_plan(folder.parent / "plan.yaml", texts), StudyOptions(folder, prepare=True))
    return folder


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"text__text_key": "body"}, "text.text_key is body in the plan, and was text when"),
        ({"text__category": None}, "text.category is None in the plan, and was kind when"),
        ({"text__tokenizer_bytes": 500}, "text.tokenizer_bytes is 500 in the plan, and was None when"),
        ({"text__evaluated_bytes": 500}, "text.evaluated_bytes is 500 in the plan, and was None when"),
        ({"warmup_share": 0.2}, "warmup_share is 0.2 in the plan, and was 0.05 when"),
        (
            {"entropy_models__tiny": {"model": BYTE_LM, "steps": 20}},
            "entropy_models.tiny.steps is 20 in the plan, and was 6 when",
        ),
        (
            {"entropy_models__tiny": {"model": BYTE_LM, "steps": 6, "optimizer": {"lr": 1e-3}}},
            "entropy_models.tiny.optimizer.lr is 0.001 in the plan, and was 0.003 when",
        ),
    ],
)
def test_another_basis_is_refused(
    tmp_path: Path, prepared: Path, texts: dict[str, str], changes: dict[str, Any], line: str
) -> None:
    path, folders = write_plan(tmp_path / "plan.yaml", texts, **changes), [prepared]
    if line.startswith("entropy_models"):  # before there was a basis, these had their settings beside them
        folders.append(tmp_path / "study")
        shutil.copytree(prepared / "entropy_models", folders[-1] / "entropy_models")
    for folder in folders:
        with pytest.raises(UserError) as error:
            planned_runs(path, StudyOptions(folder))
        assert str(error.value).startswith(line)
        assert str(error.value).endswith(f"the study in '{folder}' began; put it back, or name another folder: --out")


def test_the_same_basis_and_what_is_new_are_kept(tmp_path: Path, prepared: Path, texts: dict[str, str]) -> None:
    shutil.copytree(prepared, folder := tmp_path / "study")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    plan = write_plan(tmp_path / "plan.yaml", texts, max_epochs=5, text__max_bad_rows=7)
    assert len(planned_runs(plan, StudyOptions(folder), writes=True)[1]) == 4
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} == before
    models = {**PLAN["entropy_models"], "more": {"model": BYTE_LM, "steps": 3}}
    plan = write_plan(tmp_path / "plan.yaml", texts, entropy_models=models)
    Basis(load_plan(plan), folder, ["more"]).keep()
    assert json.loads((folder / BASIS).read_text())["entropy_models"].keys() == {"tiny", "more"}


def test_an_entropy_model_from_elsewhere_is_known_by_its_weights(
    tmp_path: Path, prepared: Path, texts: dict[str, str]
) -> None:
    plan = load_plan(write_plan(tmp_path / "plan.yaml", texts, entropy_models={"tiny": str(tmp_path / "model")}))
    (tmp_path / "model").mkdir()
    model = load_byte_lm(prepared / "entropy_models" / "tiny")
    save(tmp_path / "model", model, Config(model=model.settings, context=64))
    Basis(plan, tmp_path / "study", ["tiny"]).keep()
    Basis(plan, tmp_path / "study", ["tiny"])
    then = fingerprint(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    save(tmp_path / "model", model, Config(model=model.settings, context=64))
    line = f"entropy_models.tiny.fingerprint is {fingerprint(model)} in the plan, and was {then} when"
    with pytest.raises(UserError, match=line):
        Basis(plan, tmp_path / "study", ["tiny"])


def test_categories_are_read_before_training(tmp_path: Path, texts: dict[str, str], logged: Callable[[], str]) -> None:
    rows = [json.loads(line) for line in Path(texts["held_out"]).read_text().splitlines()]
    held_out = tmp_path / "held_out.jsonl"

    def plan(changed: dict[str, Any]) -> Path:
        held_out.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], changed]))
        return write_plan(tmp_path / "plan.yaml", {**texts, "held_out": str(held_out)})

    with pytest.raises(UserError, match=r"text.category: 'kind' holds an object in '.*held_out.jsonl' row 19; name a"):
        planned_runs(plan({**rows[-1], "kind": {"a": 1}}), StudyOptions(tmp_path / "study"))
    planned_runs(plan({"text": rows[-1]["text"]}), StudyOptions(tmp_path / "study"))
    assert "text.held_out: 1 of 20 documents have no 'kind': (none)" in logged()


def test_settings_are_not_chosen_on_held_out_text(tmp_path: Path, texts: dict[str, str]) -> None:
    line = r"text.held_out: 20 of its 20 different documents are in text.tuning too, by which settings are chosen"
    path = write_plan(tmp_path / "plan.yaml", {**texts, "held_out": texts["tuning"]})
    with pytest.raises(UserError, match=line):
        planned_runs(path, StudyOptions(tmp_path / "study"))
    planned_runs(path, StudyOptions(tmp_path / "study", tuning_only=True), writes=True)
    with pytest.raises(UserError, match=line):
        planned_runs(path, StudyOptions(tmp_path / "study"))
