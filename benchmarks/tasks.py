# pyright: reportCallIssue=false, reportTypedDictNotRequiredAccess=false, reportOptionalSubscript=false
"""How long a task takes here and with lm-evaluation-harness's own model class for transformers, on the same weights.

    python benchmarks/tasks.py --model runs/demo --shots 5

Four continuations for each question, cut from text; needs what `make test-lm-eval` installs. Transformers reads padding
as text, so its batch size is 1.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from bytelatent import BLT
from bytelatent.evaluation.harness import HarnessModel
from bytelatent.inference import scoring

TASK = """
task: cut_text
dataset_path: json
dataset_kwargs: {data_files: {test: cut_text.jsonl}}
test_split: test
fewshot_split: test
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: "Text: {{question}}\\nNext:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_task(folder: Path, text: Path, questions: int) -> None:
    generator = random.Random(0)
    documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    documents = [document for document in documents if len(document) > 400]

    def piece(size: int) -> str:
        document = generator.choice(documents)
        begin = generator.randrange(len(document) - size)
        return document[begin : begin + size].strip() or "x"

    rows = [
        {"question": piece(200), "choices": [piece(40) for _ in range(4)], "answer": generator.randrange(4)}
        for _ in range(questions)
    ]
    (folder / "cut_text.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "cut_text.yaml").write_text(TASK, encoding="utf-8")


def measure(name: str, model: Any, shots: int) -> None:
    tasks = TaskManager(include_path=".", include_defaults=False)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    found = lm_eval.simple_evaluate(model, tasks=["cut_text"], num_fewshot=shots, task_manager=tasks, bootstrap_iters=0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    accuracy = found["results"]["cut_text"]["acc,none"]
    print(f"{name:28} {time.perf_counter() - began:8.1f} s  {cpu:8.1f} s of CPU  acc {accuracy:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    source = Path(given.model).absolute()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_task(folder, source / "text" / "valid.jsonl", given.questions)
        BLT.from_pretrained(source, device="cpu").save_pretrained(folder / "model", format="hf")
        os.chdir(folder)
        more = {"device": given.device, "dtype": "float32"}
        context = 8192
        measure("blt eval", HarnessModel(str(source), max_length=context, **more), given.shots)
        shared, scoring.SHARED_IDS = scoring.SHARED_IDS, context
        measure("without shared prefixes", HarnessModel(str(source), max_length=context, **more), given.shots)
        scoring.SHARED_IDS = shared
        measure("lm_eval's own hf", HFLM(str(folder / "model"), batch_size=1, max_length=context, **more), given.shots)


if __name__ == "__main__":
    main()
