"""Tests with lm_eval itself, which `make test-lm-eval` installs and runs; `make test` has no lm_eval."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

if "LM_EVAL" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network; those that need it unset start processes

WORDS = ["the", "of", "a", "patch", "byte", "model", "small", "été", "text", "你好", "reads", "and", "writes", "😀"]


def sentence(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choices(WORDS, k=num_words))


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **values: Any) -> None:
    """A task file and its data beside it."""
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    metrics = [
        {"metric": metric, "aggregation": how, "higher_is_better": better} for metric, how, better in values.pop("m")
    ]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "metric_list": metrics,
        **values,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks: multiple choice with examples, texts, and continuations."""
    folder, generator = tmp_path_factory.mktemp("tasks"), random.Random(0)
    choices = [[sentence(generator, generator.randint(1, 3)) for _ in range(4)] for _ in range(20)]
    rows = [
        {"question": sentence(generator, generator.randint(1, 12)), "choices": four, "answer": generator.randrange(4)}
        for four in choices
    ]
    write_task(
        folder,
        "local_choice",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{question}}:",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        fewshot_split="test",
        m=[("acc", "mean", True), ("acc_norm", "mean", True), ("brier_score", "brier_score", False)],
    )
    texts = [{"text": sentence(generator, size)} for size in (1, 5, 11, 30, 60)]
    write_task(
        folder,
        "local_text",
        texts,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        m=[
            ("word_perplexity", "weighted_perplexity", False),
            ("byte_perplexity", "weighted_perplexity", False),
            ("bits_per_byte", "bits_per_byte", False),
        ],
    )
    write_task(
        folder,
        "local_continuation",
        [{"question": sentence(generator, size), "answer": "a"} for size in (1, 3, 4, 20)],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n", "q"], "max_gen_toks": 12, "do_sample": False},
        m=[("exact_match", "mean", True)],
    )
    return folder


class Requests:
    """Requests as lm_eval makes them."""

    def __init__(self, *args: Any):
        self.args = args


def asked(*requests: tuple[Any, ...]) -> list[Any]:
    return [Requests(*request) for request in requests]
