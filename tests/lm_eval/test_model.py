"""The interface of a model of lm_eval: order, repeats, sampling, caches, formats, and errors."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.evaluation.harness import HarnessModel
from bytelatent.inference import Decoder, Sampling
from bytelatent.model.settings import CrossAttentionSettings
from bytelatent.weights import BYTE_LM, Config, save
from tests.lm_eval.conftest import asked
from tests.model.tiny import tiny_blt, tiny_byte_lm
from tests.test_blt import wrap

GREEDY = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}


@pytest.fixture(scope="module")
def blt() -> BLT:
    heads = CrossAttentionSettings(k=2, num_heads=2)  # as the format of transformers has them
    return wrap(tiny_blt(window=6, cross_attention=heads))  # context 24


@pytest.fixture(scope="module")
def folder(blt: BLT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "native"
    blt.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> HarnessModel:
    return HarnessModel(str(folder), device="cpu")


def test_scores_are_those_of_the_public_class(model: HarnessModel, blt: BLT) -> None:
    pairs = [("a text", " more"), ("", "x"), ("a text", "b"), ("other", "\u00e9t\u00e9"), ("a text", " more")]
    found = model.loglikelihood(asked(*pairs))
    assert [score for score, _ in found] == pytest.approx(
        [blt.score(*[pair[0], [pair[1]]])[0] for pair in pairs], abs=1e-5
    )
    assert found[0] == pytest.approx(found[-1])


def test_greedy_continuations(model: HarnessModel, blt: BLT) -> None:
    """Of any bytes: a surrogate stands for one that is no UTF-8."""
    engine = blt.engine(1)
    [continuation] = engine.submit("prompt", Sampling(temperature=0), 4)
    engine.run()
    texts = [continuation.data, continuation.data[:-1], continuation.data[:-1] + bytes([continuation.data[-1] ^ 1])]
    pairs = [("prompt", text.decode(errors="surrogateescape")) for text in texts]
    assert [greedy for _, greedy in model.loglikelihood(asked(*pairs))] == [True, True, False]


def test_no_bytes_to_score(model: HarnessModel) -> None:
    assert model.loglikelihood(asked(("some", ""), ("", ""))) == [(0.0, True), (0.0, True)]
    assert model.loglikelihood_rolling(asked(("",))) == [0.0]
    assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []


def test_the_beginning_of_a_long_context_is_dropped(model: HarnessModel, blt: BLT) -> None:
    """As in lm_eval's own class: of BOS, context and continuation without its last id, the newest 24 ids count."""
    [(score, _)] = model.loglikelihood(asked(("0123456789" * 5, "abcd")))
    ids = [4 + byte for byte in ("0123456789" * 5 + "abcd").encode()][-25:]
    assert score == pytest.approx(score_of(blt, ids, 4), abs=1e-5)
    [short] = model.loglikelihood(asked(("0123456789", "abcd")))
    assert short[0] == pytest.approx(blt.score("0123456789", ["abcd"])[0], abs=1e-5)


def score_of(blt: BLT, ids: list[int], count: int) -> float:
    """log P of the last ids, from the logits of all."""
    logits = blt.logits(torch.tensor(ids)[None])[0].double().log_softmax(-1)
    return float(sum(logits[len(ids) - count - 1 + at, ids[len(ids) - count + at]] for at in range(count)))


def test_windows_of_long_texts(model: HarnessModel, blt: BLT) -> None:
    """Each byte is predicted once; the last window is full, and counts only what is new."""
    text = "".join(chr(97 + number % 26) for number in range(60))
    ids = [1, *(4 + byte for byte in text.encode())]
    expected = score_of(blt, ids[:25], 24) + score_of(blt, ids[24:49], 24) + score_of(blt, ids[-25:], 12)
    assert model.loglikelihood_rolling(asked((text,), ("x",)))[0] == pytest.approx(expected, abs=1e-5)


def test_prompts_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The four choices of a question, and the examples before all questions."""
    model, sizes, prefill = HarnessModel(str(folder), device="cpu", max_length=1000), [], Decoder.prefill

    def counted(self: Decoder, prompts: Any, last_only: bool = False) -> Any:
        sizes.append(sum(map(len, prompts)))
        return prefill(self, prompts, last_only)

    monkeypatch.setattr(Decoder, "prefill", counted)
    examples = "An example, and its answer. " * 12
    model.loglikelihood(asked(*[(f"{examples}{question}?", choice) for question in "abc" for choice in "xyzw"]))
    assert sizes == [len(examples) + 1]


def test_generation(model: HarnessModel, blt: BLT) -> None:
    prompts = ["one", "a longer one", "1"]
    expected = [blt.generate(prompt, max_new_bytes=6, temperature=0, stop=["\n"]) for prompt in prompts]
    assert model.generate_until(asked(*[(prompt, GREEDY) for prompt in prompts])) == expected


def test_settings_of_generation(model: HarnessModel, blt: BLT) -> None:
    sampled = {"until": "z", "max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    [one] = model.generate_until(asked(("text", sampled)))
    assert one == blt.generate("text", max_new_bytes=5, temperature=0.7, top_p=0.9, stop=["z"], seed=0)
    [plain] = model.generate_until(asked(("text", {"until": [], "max_gen_toks": 5})))
    assert plain == blt.generate("text", max_new_bytes=5, temperature=0)
    [hot] = model.generate_until(asked(("text", {"until": [], "max_gen_toks": 5, "do_sample": True})))
    assert hot == blt.generate("text", max_new_bytes=5, temperature=1.0)


def test_repeats_are_sampled_apart(model: HarnessModel, blt: BLT) -> None:
    """With the seeds that follow one another, wherever they are among the requests."""
    sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    found = model.generate_until(asked(("a", sampled), ("b", sampled), ("a", sampled), ("a", sampled), ("b", sampled)))
    a, b = blt.generate("a", 8, samples=3, temperature=1.0), blt.generate("b", 8, samples=2, temperature=1.0)
    assert found == [a[0], b[0], a[1], a[2], b[1]]
    assert len(set(a)) == 3


def test_answers_go_to_the_cache_of_lm_eval(model: HarnessModel, tmp_path: Path) -> None:
    cached = CachingLM(model, str(tmp_path / "cache.db"))
    calls: Counter[str] = Counter()
    for kind, request in (
        ("loglikelihood", ("a", "b")),
        ("loglikelihood_rolling", ("a",)),
        ("generate_until", ("a", GREEDY)),
    ):
        [first] = getattr(cached, kind)(asked(request))
        original = getattr(model, kind)

        def counted(requests: list[Any], kind: str = kind, original: Any = original) -> Any:
            calls[kind] += len(requests)
            return original(requests)

        setattr(model, kind, counted)
        assert getattr(cached, kind)(asked(request)) == [first]
        delattr(model, kind)
    assert not calls
    model.set_cache_hook(lm_eval.api.model.CacheHook(None))


@pytest.mark.parametrize("format", ["hf", "meta"])
def test_every_format(format: str, model: HarnessModel, blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / format, format=format)
    requests = asked(("a text", " more"), ("", "x"))
    other = HarnessModel(str(tmp_path / format), device="cpu").loglikelihood(requests)
    assert [score for score, _ in other] == pytest.approx(
        [score for score, _ in model.loglikelihood(requests)], abs=1e-4
    )


def test_a_byte_lm(tmp_path: Path) -> None:
    byte_lm = tiny_byte_lm(window=6)
    (tmp_path / BYTE_LM).mkdir()
    save(tmp_path / BYTE_LM, byte_lm, Config(model=byte_lm.settings, context=24))
    model = HarnessModel(str(tmp_path / BYTE_LM), device="cpu")
    [(score, _)] = model.loglikelihood(asked(("a", "bc")))
    assert score < 0
    assert len(model.generate_until(asked(("a", GREEDY)))) == 1


def test_as_lm_eval_makes_it(folder: Path, local_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval's own test of a model: the same from `simple_evaluate` with arguments as from `evaluate`."""
    monkeypatch.chdir(local_tasks)
    arguments = f"pretrained={folder},dtype=float32"
    manager = TaskManager(include_path=str(local_tasks), include_defaults=False)
    more: dict[str, Any] = {"limit": 5, "bootstrap_iters": 100}
    one = lm_eval.simple_evaluate("bytelatent", arguments, ["local_choice"], task_manager=manager, device="cpu", **more)
    made = get_model("bytelatent").create_from_arg_string(
        arguments, {"batch_size": None, "max_batch_size": None, "device": None}
    )
    tasks = manager.load(["local_choice"])
    other = lm_eval.evaluate(lm=made, task_dict=tasks, **more)
    assert one["results"] == other["results"]
    assert json.dumps(one["results"], default=float)
    assert (made.rank, made.world_size) == (0, 1)
    with pytest.raises(NotImplementedError):
        made.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretraind": "x"}, r"model_args: 'pretraind' is unknown; .*did you mean 'pretrained'"),
        ({"batch_size": "many"}, "batch_size: 'many' is not a number"),
        ({"max_length": 0}, "context: 0 is not a number"),
        ({"quantize": "int4"}, "int4"),
        ({"pretrained": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        HarnessModel(**{"pretrained": str(folder), "device": "cpu", **given})


def test_bad_requests(model: HarnessModel) -> None:
    with pytest.raises(UserError, match="max_length: a continuation has 25 ids and 24 fit"):
        model.loglikelihood(asked(("a", "x" * 25)))
    with pytest.raises(UserError, match="max_gen_toks: 24 leave no space"):
        model.generate_until(asked(("a", {"max_gen_toks": 24})))
    for value in ("abc", [3], 1.5, -1, True):
        with pytest.raises(UserError, match=r"generation_kwargs: max_gen_toks is .*; give a whole number above 0"):
            model.generate_until(asked(("a", {"max_gen_toks": value})))
    with pytest.raises(UserError, match=r"generation_kwargs: .*stop"):
        model.generate_until(asked(("a", {"until": 5, "max_gen_toks": 4})))
