"""Noise over tasks of lm-eval, against the same tasks whose data have the noise already."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_tasks import evaluate_tasks, run
from bytelatent.evaluation.noise import NOISES, Noise, with_noise
from tests.commands.test_eval_text import place

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

__all__ = ["place"]  # a fixture

DOCS = [
    {"q": "the cat sat on", "choices": ["the mat", "a hat", "two dogs"], "gold": 0},
    {"q": "rivers run to", "choices": ["the sea", "a hill", "the moon"], "gold": 0},
    {"q": "bees make", "choices": ["cheese", "honey", "bread"], "gold": 1},
    {"q": "snow is", "choices": ["black", "blue", "white"], "gold": 2},
    {"q": "one and one", "choices": ["is two", "is three", "is ten"], "gold": 0},
]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
GENERATION = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


class Checksums(LM):
    """Scores texts by their checksums, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def _of(self, requests: list[Any]) -> list[float]:
        self.asked += [request.args for request in requests]
        return [-(zlib.crc32("|".join(map(str, request.args)).encode()) % 1000) / 100 for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(value, value > -5) for value in self._of(requests)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._of(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [str(value) for value in self._of(requests)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LM], dict[str, Any]]:
    """The results of a model on each task, and on each with upper case in its data: prompts, completions or both."""
    folder = tmp_path_factory.mktemp("tasks")
    for on in ("", "prompt", "completion", "both"):
        docs = [
            {
                "q": doc["q"].upper() if on in ("prompt", "both") else doc["q"],
                "choices": [c.upper() if on in ("completion", "both") else c for c in doc["choices"]],
                "gold": doc["gold"],
            }
            for doc in DOCS
        ]
        data = folder / f"docs{on}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        for kind, text in (("choice", CHOICE), ("rolling", ROLLING), ("generation", GENERATION)):
            (folder / f"{kind}{on}.yaml").write_text(text.format(name=f"{kind}{on}", data=data))
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(lm: LM, *names: str) -> dict[str, Any]:
        found = lm_eval.simple_evaluate(
            model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, random_seed=0
        )
        assert found is not None
        return {name: {k: v for k, v in found["results"][name].items() if "," in k} for name in names}

    return run


@pytest.mark.parametrize("on", ["prompt", "completion", "both"])
def test_noise_is_that_of_noisy_data(evaluated: Any, on: Any) -> None:
    clean, noisy = Checksums(), Checksums()
    expected = evaluated(clean, f"choice{on}")[f"choice{on}"]
    found = evaluated(with_noise(noisy, Noise("uppercase", 1.0), on), "choice")["choice"]
    assert noisy.asked == clean.asked
    assert len(noisy.asked) == sum(len(doc["choices"]) for doc in DOCS)
    assert found["acc,none"] == expected["acc,none"]
    assert found["acc_norm,none"] == expected["acc_norm,none"]


def test_noise_of_texts_and_generations(evaluated: Any) -> None:
    clean, noisy = Checksums(), Checksums()
    expected = evaluated(clean, "rollingprompt", "generationprompt")  # both tasks take the prompts of the data
    found = evaluated(with_noise(noisy, Noise("uppercase", 1.0), "both"), "rolling", "generation")
    assert sorted(map(str, noisy.asked)) == sorted(map(str, clean.asked))
    assert found["rolling"]["bits_per_byte,none"] == expected["rollingprompt"]["bits_per_byte,none"]
    unchanged = Checksums()
    evaluated(with_noise(unchanged, Noise("uppercase", 1.0), "completion"), "generation")
    evaluated(clean := Checksums(), "generation")
    assert unchanged.asked == clean.asked


def test_rate_zero_changes_nothing_and_any_rate_is_reproducible(evaluated: Any) -> None:
    results = [evaluated(with_noise(Checksums(), Noise("drop", rate), "both"), "choice") for rate in (0, 0.3, 0.3)]
    assert results[0] == evaluated(Checksums(), "choice")
    assert results[1] == results[2]
    models = [Checksums(), Checksums()]
    for lm, seed in zip(models, (0, 1), strict=True):
        evaluated(with_noise(lm, Noise("drop", 0.3, seed), "both"), "choice")
    assert models[0].asked != models[1].asked


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each noise, with the same few-shot examples, and the mean beside the paper's."""
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    text = CHOICE.format(name="hellaswag", data=data) + "fewshot_split: test\n"
    (tmp_path / "hellaswag.yaml").write_text(text)
    more: dict[str, Any] = {"tasks": "hellaswag", "include_path": str(tmp_path), "shots": 1, "device": "cpu"}
    settings = EvaluateSettings.parse({"model": [str(place / "byte_lm")], **more, "context": 400})
    found = evaluate_tasks(settings.model_copy(update={"noise": ["all"]}))
    [clean] = evaluate_tasks(settings)["tasks"]
    assert found["tasks"][0] == clean
    assert [row["noise"] for row in found["tasks"]] == [None, *NOISES]
    for noise in NOISES:
        [_, row] = evaluate_tasks(settings.model_copy(update={"noise": [noise]}))["tasks"]
        assert row in found["tasks"]
    run(settings.model_copy(update={"noise": ["all"], "figure": tmp_path / "curves.svg"}))
    *_, last = capsys.readouterr().out.splitlines()
    mean = sum(row["metrics"]["acc_norm,none"] for row in found["tasks"][1:]) / len(NOISES)
    assert last.split() == ["hellaswag", "mean", "all", "noises", f"{mean:.4f}", "0.569", "0.643"]
    assert (tmp_path / "curves.svg").stat().st_size
