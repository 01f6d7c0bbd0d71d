"""Plans: what follows from one, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytelatent.errors import UserError
from bytelatent.study.cost import PlannedRun, run_cost
from bytelatent.study.plan import StudyPlan, StudyText, budget_name, load_plan
from bytelatent.study.run import StudyOptions, planned_runs, run_study
from bytelatent.study.training_text import TrainingText
from tests.study.study_plans import BUDGETS, FAMILIES, PLAN, write_plan, write_texts
from tests.training.tiny_runs import BLT, BYTE_LM, STACK, write_text

STUDIES = Path(__file__).parents[2] / "apps" / "bytelatent" / "studies"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_texts(tmp_path_factory.mktemp("text"))


def planned(folder: Path, texts: dict[str, str], is_trials: bool = False, **changes: Any) -> list[PlannedRun]:
    path = write_plan(folder / "plan.yaml", texts, **changes)
    return planned_runs(path, StudyOptions(folder / "study", trials=is_trials))[1]


def test_runs_spend_their_budgets_to_within_a_step(tmp_path: Path, texts: dict[str, str]) -> None:
    runs = planned(tmp_path, texts, seeds={BUDGETS[0]: [0, 7], BUDGETS[1]: [0]})
    assert [run.name for run in runs] == [
        *("token-4e08-0", "entropy-4e08-0", "token-4e08-7", "entropy-4e08-7", "token-9e08-0", "entropy-9e08-0"),
    ]
    for run in runs:
        flops = run.steps * run.bytes_per_step * sum(run.cost.training_flops_per_byte.values())
        assert abs(flops - run.draft.budget) <= run.flops_per_step
        assert run.settings.steps == run.steps > 5
        assert run.settings.seed == run.draft.seed
        assert run.settings.optimizer.warmup_steps == round(0.05 * run.steps)
    assert [run.settings.model.num_layers for run in runs if run.draft.family == "token"] == [1, 1, 2]
    assert not (tmp_path / "study").exists()


def test_of_a_token_lm_batches_hold_as_many_bytes(tmp_path: Path, texts: dict[str, str]) -> None:
    token, entropy = planned(tmp_path, texts)[:2]
    assert token.measured.is_expected  # its tokenizer is not there yet
    assert token.bytes_per_step == pytest.approx(entropy.bytes_per_step, rel=0.1)
    given = FAMILIES["token"] | {"settings": {**FAMILIES["token"]["settings"], "data": {"patch_bytes": 2.0}}}
    token = planned(tmp_path, texts, families__token=given)[0]
    assert token.settings.data.batch_ids == 128


def test_settings_are_laid_over_one_another(tmp_path: Path, texts: dict[str, str]) -> None:
    families = {
        "small": {"settings": {"model": {"kind": "byte_lm", **STACK}, "optimizer": {"lr": 1e-2, "warmup_steps": 3}}},
        "other": {"like": "small", "settings": {"optimizer": {"lr": 2e-2}}, "budgets": [BUDGETS[1]]},
        "preset": {"settings": {"model": "demo-byte-lm"}, "sizes": {b: {"model": {"num_layers": 1}} for b in BUDGETS}},
    }
    runs = {run.name: run for run in planned(tmp_path, texts, families=families)}
    assert runs.keys() == {*("small-4e08-0", "preset-4e08-0", "small-9e08-0", "other-9e08-0", "preset-9e08-0")}
    other = runs["other-9e08-0"].settings
    assert (other.optimizer.lr, other.optimizer.warmup_steps, other.data.batch_bytes) == (2e-2, 3, 256)
    assert other.model == runs["small-9e08-0"].settings.model
    model = runs["preset-9e08-0"].settings.model
    assert (model.dim, model.num_layers) == (128, 1)
    measured = runs["small-9e08-0"].measured
    assert measured.unit_bytes == 1
    assert 30 < measured.context_bytes <= 64


def test_a_ladder_gives_the_size_nearest_to_the_wanted_ratio(tmp_path: Path, texts: dict[str, str]) -> None:
    ladder = [{"model": {"dim": dim}} for dim in (8, 16, 32, 64)]
    family = {"settings": {"model": {"kind": "byte_lm", **STACK}}, "ladder": ladder, "bytes_per_parameter": 1.5}
    for budget, most in ((4e8, 10), (9e8, 10), (4e8, 0.3)):
        changes = {"families": {"flat": family}, "budgets": [budget], "max_epochs": most}
        [run] = planned(tmp_path, texts, **changes)
        ratios = {}
        for size in [run, *run.others]:
            cost = run_cost(size.draft.settings.model, 1.0, size.measured.context_bytes)
            bytes_read = budget / sum(cost.training_flops_per_byte.values())
            if bytes_read / run.train_bytes <= most:
                ratios[size.draft.settings.model.dim] = bytes_read / cost.non_embedding_parameters
        best = min(ratios, key=lambda dim: max(ratios[dim] / 1.5, 1.5 / ratios[dim]))
        assert run.draft.settings.model.dim == best
        assert run.epochs <= most


def test_trials_are_variations_of_families(tmp_path: Path, texts: dict[str, str]) -> None:
    of = {"token": {"fast": {"optimizer": {"lr": 1e-2}}}, "entropy": {"k1": {"model": {"cross_attention": {"k": 1}}}}}
    fast, k1 = planned(tmp_path, texts, is_trials=True, trials={"budget": 4e8, "of": of})
    assert (fast.name, fast.settings.optimizer.lr) == ("token-fast-4e08-0", 1e-2)
    assert (k1.name, k1.settings.model.cross_attention.k) == ("entropy-k1-4e08-0", 1)
    assert fast.draft.settings.model.num_layers == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"famlies": {}}, "famlies: unknown key; did you mean 'families'?"),
        ({"families__token__labl": "x"}, "families.token.labl: unknown key; did you mean 'label'?"),
        ({"families__token__settings": {"model": BYTE_LM, "optimiser": {}}}, "families.token: optimiser: unknown key"),
        ({"families__token__settings": {"steps": 5}}, "families.token: steps: the plan decides it by budgets"),
        ({"base__data": {"train": "x"}}, "data.train: the plan decides it by text.train"),
        ({"families__token__like": "entrpy"}, "families.token.like: 'entrpy' is no other family"),
        ({"families__token__sizes": {BUDGETS[0]: {}}}, "families.token.sizes: none for the budget 9e08"),
        ({"families__token__ladder": [{}]}, "sizes and ladder both give shapes"),
        ({"budgets": [4e8, 4e8]}, "budgets are positive FLOPs that differ"),
        (
            {"budgets": [1e4, 9e8], "families__token__sizes": {}},
            "the budget 1e04 is less than half a step of 'token-1e04-0'",
        ),
        ({"max_epochs": 0.1}, "times the training text, and max_epochs is 0.1; give a larger model"),
        ({"text__category": "knd"}, "text.category: no document has 'knd'"),
        ({"text__tuning": "nowhere.jsonl"}, "text.tuning: 'nowhere.jsonl'"),
        ({"entropy_models": {}}, "families.entropy: entropy_model: 'tiny' is not one of the plan's entropy_models"),
        ({"entropy_models": {"tiny": {"model": BLT, "steps": 3}}}, "entropy_models.tiny: patching: a BLT needs"),
        ({"entropy_models": {"tiny": {"model": BYTE_LM}}}, "entropy_models.tiny: set steps or minutes"),
        ({"seeds": {BUDGETS[0]: [0]}}, "seeds: none for the budget 9e08"),
        ({"families": {"a b": {}}}, "'a b' is no name"),
        (
            {"trials": {"budget": 4e8, "of": {"token": {"a": {}, "b": {}}, "entropy": {"a": {}}}}},
            "trials: each family gets as many as the others, and here they have token 2, entropy 1; add trials",
        ),
        ({"trials": {"budget": 4e8, "of": {"tokn": {"a": {}}}}}, "trials.of: no family 'tokn'; did you mean 'token'?"),
    ],
)
def test_a_bad_plan_is_one_clear_line(
    tmp_path: Path, texts: dict[str, str], changes: dict[str, Any], line: str
) -> None:
    path = write_plan(tmp_path / "plan.yaml", texts, **changes)
    with pytest.raises(UserError) as error:
        run_study(path, StudyOptions(tmp_path / "study"))
    assert line in str(error.value)
    assert not (tmp_path / "study" / "runs").exists()


def test_held_out_text_is_not_trained_on(tmp_path: Path, texts: dict[str, str], logged: Callable[[], str]) -> None:
    mixed = tmp_path / "train.jsonl"
    documents = Path(texts["tuning"]).read_text().splitlines(keepends=True)
    mixed.write_text(Path(texts["train"]).read_text() + "".join(documents[:3]))
    with pytest.raises(UserError, match=r"text.tuning: 3 of its 20 different documents are in text.train too"):
        planned(tmp_path, {**texts, "train": str(mixed)})
    many = write_text(tmp_path / "many.jsonl", 5, 300)
    mixed.write_text(Path(texts["train"]).read_text() + many.read_text().partition("\n")[0])
    assert planned(tmp_path, {**texts, "train": str(mixed), "held_out": str(many)}, text__category=None)
    assert "text.held_out: 1 of its 300 different documents are in text.train too" in logged()


def test_the_sample_is_from_all_over_the_text(tmp_path: Path, texts: dict[str, str]) -> None:
    settings = StudyText(**texts, measured_bytes=4000)
    training = TrainingText(settings, tmp_path)
    documents = [json.loads(line)["text"] for line in Path(texts["train"]).read_text().splitlines()]
    sample = [json.loads(line)["text"] for line in training.sample.read_text().splitlines()]
    at = sorted(documents.index(text) for text in sample)
    assert len(set(at)) == len(sample)
    assert 4000 <= training.sample_bytes < 4000 + max(map(len, sample))
    assert training.sample_bytes == sum(map(len, sample))
    assert at[0] < len(documents) / 5
    assert at[-1] > len(documents) * 4 / 5
    reversed_text = tmp_path / "reversed.jsonl"
    reversed_text.write_text("".join(reversed(Path(texts["train"]).read_text().splitlines(keepends=True))))
    other = TrainingText(StudyText(**{**texts, "train": str(reversed_text)}, measured_bytes=4000), tmp_path / "other")
    assert other.sample.read_text() == training.sample.read_text()


def test_unequal_trials_can_be_written() -> None:
    text = dict.fromkeys(("train", "tuning", "held_out"), "x.jsonl")
    trials = {"budget": 4e8, "of": {"token": {"a": {}}}}
    plan = StudyPlan.parse({**PLAN, "text": text, "trials": trials, "unequal_trials": True})
    assert [sizes[0].name for sizes in plan.drafts(Path("x"), trials=True)] == ["token-a-4e08-0"]


def test_unknown_families_and_missing_plans_are_named(tmp_path: Path, texts: dict[str, str]) -> None:
    path = write_plan(tmp_path / "plan.yaml", texts)
    with pytest.raises(UserError, match="only: the plan has no family 'tokn'; did you mean 'token'"):
        planned_runs(path, StudyOptions(tmp_path / "study", only=["tokn"]))
    with pytest.raises(UserError, match="budget: 1e16 is not one of the plan's budgets: 4e08, 9e08"):
        planned_runs(path, StudyOptions(tmp_path / "study", budgets=[1e16]))
    [run] = planned_runs(path, StudyOptions(tmp_path / "study", only=["entropy"], budgets=[9e8]))[1]
    assert run.name == "entropy-9e08-0"
    with pytest.raises(UserError, match="trials: the plan has none"):
        planned_runs(path, StudyOptions(tmp_path / "study", trials=True))
    with pytest.raises(UserError, match=r"plan: 'nowhere.yaml' does not exist"):
        load_plan(Path("nowhere.yaml"))


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_of_the_project_are_plans(path: Path) -> None:
    plan = load_plan(path)
    names = [sizes[0].name for sizes in plan.drafts(Path("runs/x"))]
    assert len(set(names)) == len(names) > 1
    assert all(plan.entropy_model_settings(Path("x"), name) is not None for name in plan.entropy_models)


def test_names_of_budgets() -> None:
    assert [budget_name(budget) for budget in (1e16, 5.5e16, 3e17, 4e8)] == ["1e16", "5.5e16", "3e17", "4e08"]
