"""The same numbers as lm_eval's own model class for transformers, on the same exported weights."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bytelatent import BLT
from bytelatent.evaluation.harness import HarnessModel
from bytelatent.model import TokenLMSettings
from bytelatent.text.tokenizer import TOKENIZER, Tokenizer, train_tokenizer
from bytelatent.weights import Config, StoredModel, convert, open_pretrained, write_model
from tests.lm_eval.conftest import WORDS, asked
from tests.model.tiny import make
from tests.weights.test_hugging_face import random_rows
from tests.weights.test_transformers4 import export

THETAS = (100.0, 1_000.0, 10_000.0, 100_000.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLT with its entropy model, as transformers reads it; context 64."""
    folder = tmp_path_factory.mktemp("exported")
    export(folder / "model", THETAS, random_rows(0))
    return folder / "model"


@pytest.fixture(scope="module")
def ours(exported: Path) -> HarnessModel:
    return HarnessModel(str(exported), device="cpu")


def theirs(folder: Path, **values: Any) -> HFLM:
    """lm_eval's own, of batch size 1: transformers takes padding for text. Its KV cache fails in transformers."""
    model = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32", **values)
    generate = model.model.generate
    model.model.generate = lambda *args, **kwargs: generate(*args, **{**kwargs, "use_cache": False})
    return model


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def results(model: Any, folder: Path, task: str, shots: int | None = None) -> dict[str, Any]:
    with inside(folder):
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        return lm_eval.simple_evaluate(
            model=model, tasks=[task], num_fewshot=shots, task_manager=manager, bootstrap_iters=0
        )


def assert_same(one: dict[str, Any], other: dict[str, Any], task: str) -> None:
    """Every number as lm_eval prints it; a perplexity of words, of ten digits here, to as many as float32 has."""
    mine, its = one["results"][task], other["results"][task]
    assert mine.keys() == its.keys()
    for name, value in its.items():
        if not isinstance(value, float):
            assert mine[name] == value
        elif name.startswith("word_perplexity"):
            assert mine[name] == pytest.approx(value, rel=2e-5)
        else:
            assert f"{mine[name]:.4f}" == f"{value:.4f}", name


def assert_close(mine: list[Any], its: list[Any]) -> None:
    """Log-likelihoods, and whether they are greedy."""
    assert [score for score, _ in mine] == pytest.approx([score for score, _ in its], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in its]


@pytest.mark.parametrize("shots", [0, 1, 3])  # the last does not fit into the context, and loses its beginning
def test_multiple_choice(ours: HarnessModel, exported: Path, local_tasks: Path, shots: int) -> None:
    mine, its = (results(model, local_tasks, "local_choice", shots) for model in (ours, theirs(exported)))
    assert_same(mine, its, "local_choice")
    for one, other in zip(mine["samples"]["local_choice"], its["samples"]["local_choice"], strict=True):
        for (my_score, my_greedy), (its_score, its_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert my_score == pytest.approx(its_score, abs=1e-3)
            assert my_greedy == its_greedy


def test_texts_of_several_windows(ours: HarnessModel, exported: Path, local_tasks: Path) -> None:
    """Theirs must not add BOS to a text, to which it adds its prefix, BOS, in any case."""
    other = theirs(exported, add_bos_token=False)
    assert_same(results(ours, local_tasks, "local_text"), results(other, local_tasks, "local_text"), "local_text")


def test_generation(ours: HarnessModel, exported: Path, local_tasks: Path) -> None:
    name = "local_continuation"
    mine, its = (results(model, local_tasks, name) for model in (ours, theirs(exported)))
    assert_same(mine, its, name)
    texts, others = ([row["resps"] for row in found["samples"][name]] for found in (mine, its))
    assert texts == others
    assert any(text[0] for text in texts)


def test_single_requests(ours: HarnessModel, exported: Path) -> None:
    """Also of greedy continuations, empty contexts, and bytes that begin a character."""
    [text] = ours.generate_until(asked(("the byte", {"until": [], "max_gen_toks": 6})))
    requests = asked(("the byte", text), ("", " of"), ("a\u00e9", "\u00e9t"), ("x" * 100, "y" * 64), ("", "z"))
    assert_close(ours.loglikelihood(requests), theirs(exported).loglikelihood(requests))


def test_whitespace_at_the_end_of_a_context_stays_there(ours: HarnessModel, exported: Path) -> None:
    """Theirs moves it into what is scored, for the sake of tokens; the difference is what the whitespace costs."""
    [(mine, _), (space, _)] = ours.loglikelihood(asked(("of the ", "byte"), ("of the", " ")))
    [(its, _)] = theirs(exported).loglikelihood(asked(("of the ", "byte")))
    assert mine + space == pytest.approx(its, abs=1e-3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[HarnessModel, HFLM]:
    """A token LM in our format and as transformers' Llama; context 40."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / TOKENIZER).write_text(train_tokenizer([" ".join(WORDS).encode()] * 9, 300))
    size = Tokenizer.read(folder / TOKENIZER).size  # transformers would also draw ids that no token has
    model = make(TokenLMSettings(dim=32, num_layers=2, num_heads=4, multiple_of=8, vocab_size=size))
    stored = replace(StoredModel.of(model, Config(model=model.settings, context=40)), tokenizer=folder / TOKENIZER)
    write_model(stored, folder / "own", "native")
    convert(open_pretrained(folder / "own"), folder / "theirs", "hf")
    return HarnessModel(str(folder / "own"), device="cpu"), HFLM(str(folder / "theirs"), device="cpu", dtype="float32")


@pytest.mark.parametrize("shots", [0, 3])
def test_a_token_lm(llama: tuple[HarnessModel, HFLM], local_tasks: Path, shots: int) -> None:
    mine, its = (results(model, local_tasks, "local_choice", shots) for model in llama)
    assert_same(mine, its, "local_choice")
    for one, other in zip(mine["samples"]["local_choice"], its["samples"]["local_choice"], strict=True):
        assert_close(one["filtered_resps"], other["filtered_resps"])


def test_texts_and_generation_of_a_token_lm(llama: tuple[HarnessModel, HFLM], local_tasks: Path) -> None:
    ours, theirs = llama
    name = "local_continuation"
    mine, its = (results(model, local_tasks, name) for model in llama)
    assert_same(mine, its, name)
    assert [row["resps"] for row in mine["samples"][name]] == [row["resps"] for row in its["samples"][name]]
    [(mine_spaced, _)], [(its_spaced, _)] = (model.loglikelihood(asked(("the  ", "byte"))) for model in llama)
    assert mine_spaced == pytest.approx(its_spaced, abs=1e-3)
    theirs.add_bos_token = False
    assert_same(results(ours, local_tasks, "local_text"), results(theirs, local_tasks, "local_text"), "local_text")


def test_ids_of_the_exported_tokenizer(exported: Path) -> None:
    model = theirs(exported)
    text = "a \u00e9\n\U0001f600"
    assert model.tok_encode(text) == [1, *(byte + 4 for byte in text.encode())]
    assert model.tok_encode(text, add_special_tokens=False) == [byte + 4 for byte in text.encode()]
    assert (model.prefix_token_id, model.eot_token_id, model.max_length) == (1, 2, 64)
    assert torch.equal(torch.tensor(model.tok_encode("")), torch.tensor([1]))


def test_our_class_in_their_backend(ours: HarnessModel, exported: Path, local_tasks: Path, tmp_path: Path) -> None:
    """lm_eval's own class gives our numbers with `bytelatent.hf`, in batches, on its own caches of generation."""
    import bytelatent.hf  # noqa: F401

    BLT.from_pretrained(exported, device="cpu").save_pretrained(tmp_path / "native")
    common: dict[str, Any] = {"pretrained": str(tmp_path / "native"), "device": "cpu", "batch_size": 3}
    with_bos, other = HFLM(**common, dtype="float32"), HFLM(**common, dtype="float32", add_bos_token=False)
    assert type(with_bos.model).__name__ == "BytelatentForCausalLM"
    for task, its in (("local_text", other), ("local_choice", with_bos), ("local_continuation", with_bos)):
        mine, theirs_ = (results(model, local_tasks, task) for model in (ours, its))
        assert_same(mine, theirs_, task)
    texts, others = ([row["resps"] for row in found["samples"]["local_continuation"]] for found in (mine, theirs_))
    assert texts == others
