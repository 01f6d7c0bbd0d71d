"""`blt eval --tasks cute,g2p` and `blt eval TEXT --noise`: on models of bytes and of tokens, resumable."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytelatent import BLT
from bytelatent.commands import eval_characters
from bytelatent.commands.eval import run
from bytelatent.commands.eval_characters import evaluate_examples, means_of_cute, split_tasks, table_of
from bytelatent.commands.eval_noise import evaluate_noise
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_text import evaluate_models
from bytelatent.errors import Interrupted, UserError
from bytelatent.evaluation.cute import Words
from bytelatent.evaluation.noise import Noise
from bytelatent.model import TokenLMSettings, build_model
from bytelatent.text.tokenizer import train_tokenizer
from bytelatent.weights import Config, StoredModel, write_model
from tests.commands.test_eval_text import TEXTS, place
from tests.evaluation.test_cute import TEXT, solve

__all__ = ["place"]  # a fixture
WORDS = "".join(f"{word}\n" for word in sorted(set(TEXT.replace(",", "").replace(".", "").split())))


def settings_of(place: Path, *models: str, **more: Any) -> EvaluateSettings:
    words = place / "words.txt"
    words.write_text(WORDS)
    given = {"model": [str(place / model) for model in models], "device": "cpu"}
    given |= {} if "text" in more else {"words": str(words), "limit": 3}
    return EvaluateSettings.parse(given | more)


class Oracle:
    """Answers as `solve` does; from some example on, it is stopped."""

    def __init__(self, stop_at: int | None = None):
        self.stop_at, self.asked = stop_at, 0

    def __call__(self, prompts: Sequence[str], stop: Sequence[str], max_new_bytes: int) -> Iterator[str]:
        assert list(stop) == ["\n"]
        for prompt in prompts:
            if self.asked == self.stop_at:
                raise KeyboardInterrupt
            self.asked += 1
            yield f" {solve(prompt)}"
            assert len(solve(prompt)) < max_new_bytes


def test_an_oracle_scores_100_and_random_models_0(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(place, "blt", "byte_lm", "llama", tasks="cute_spell,cute_swap_word", dtype="float32")
    results = evaluate_examples(settings, ["cute_spell", "cute_swap_word"])
    assert [result["value"] for result in results] == [0.0] * 6
    assert [result["num_examples"] for result in results] == [3] * 6
    monkeypatch.setattr(eval_characters, "_generator", lambda settings, found: Oracle())
    results = evaluate_examples(settings_of(place, "blt", related=str(_related(place))), ["cute"])
    assert [result["value"] for result in results] == [1.0] * 14
    [mean] = means_of_cute(results)
    assert (mean["value"], mean["num_examples"]) == (1.0, 42)
    lines = table_of(results).splitlines()
    assert lines[1].split() == ["cute_spell", "exact", "match", "100.0", *["–"], "3", "1.1", "99.9"]
    assert lines[-1].split() == ["cute", "exact", "match", "100.0", "–", "42", "27.5", "54.1"]


def _related(place: Path) -> Path:
    path = place / "related.tsv"
    path.write_text("happy\tglad\nwide\tbroad\npath\troad\nsnow\tice\ngarden\tpark\nriver\tstream\n")
    return path


def test_a_model_continues_as_it_generates(place: Path, tmp_path: Path) -> None:
    """The same text as that of `BLT.generate`, and as transformers gives for one prompt at a time."""
    settings = settings_of(place, "blt", "llama", tasks="cute_spell", out=str(tmp_path / "out.json"))
    evaluate_examples(settings, ["cute_spell"])
    rows = [json.loads(line) for line in (tmp_path / "out.json.rows.jsonl").read_text().splitlines()]
    model = BLT.from_pretrained(place / "blt", device="cpu")
    of_blt, of_llama = rows[:3], rows[3:]
    longest = 8 + 2 * max(len(row["answers"][0]) for row in of_blt)
    expected = model.generate([row["prompt"] for row in of_blt], longest, temperature=0, stop=["\n"])
    assert [row["text"] for row in of_blt] == expected
    network, tokenizer = (each.from_pretrained(place / "llama") for each in (AutoModelForCausalLM, AutoTokenizer))
    for row in of_llama:
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        start = ids.new_full((1, 1), tokenizer.bos_token_id or tokenizer.eos_token_id)
        given = torch.cat([start, ids], 1)
        new = network.generate(given, max_new_tokens=longest, do_sample=False, pad_token_id=0)[0, given.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]
        assert row["text"] == text


def test_a_token_lm_answers_as_its_export(place: Path, tmp_path: Path) -> None:
    tokenizer = place / "tokenizer.json"
    tokenizer.write_text(train_tokenizer([TEXT.encode()] * 4, 290))  # which has as many ids
    torch.manual_seed(3)
    model = build_model(TokenLMSettings(vocab_size=290, dim=32, num_layers=2, num_heads=2, multiple_of=8))
    config = Config(model=model.settings, context=400)
    stored = replace(StoredModel.of(model, config), tokenizer=tokenizer)
    for name in ("native", "hf"):
        write_model(stored, tmp_path / name, name)
    settings = settings_of(tmp_path, "native", "hf", out=str(tmp_path / "out.json"))
    evaluate_examples(settings, ["cute_spell"])
    rows = [json.loads(line)["text"] for line in (tmp_path / "out.json.rows.jsonl").read_text().splitlines()]
    for ours, theirs in zip(rows[:3], rows[3:], strict=True):  # theirs ends after as many tokens as ours has bytes
        assert len(ours) > 10
        assert theirs.startswith(ours.rstrip("\ufffd"))


def test_an_interrupted_evaluation_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    more = {"tasks": "cute_spell,cute_del_char", "noise": ["drop:0"], "out": str(out)}
    settings, names = settings_of(place, "blt", **more), ["cute_spell", "cute_del_char"]
    first, second = Oracle(stop_at=4), Oracle()
    monkeypatch.setattr(eval_characters, "_generator", lambda settings, found: first)
    with pytest.raises(Interrupted, match=r"out.json.rows.jsonl.part', and the same command"):
        evaluate_examples(settings, names)
    monkeypatch.setattr(eval_characters, "_generator", lambda settings, found: second)
    with pytest.raises(UserError, match="was begun with seed=0, not 1"):
        evaluate_examples(settings_of(place, "blt", **more, seed=1), names)
    resumed = evaluate_examples(settings, names)
    assert (first.asked, second.asked) == (4, 2)
    assert [result["value"] for result in resumed] == [1.0, 1.0]
    with pytest.raises(UserError, match="holds something already"):
        evaluate_examples(settings, names)
    assert second.asked == 2


def test_noise_in_prompts(place: Path, tmp_path: Path) -> None:
    settings = settings_of(place, "byte_lm", noise=["uppercase"], limit=2, out=str(tmp_path / "out.json"))
    results = evaluate_examples(settings, ["cute_spell"])
    assert [(result["noise"], result["rate"]) for result in results] == [(None, 0.0), ("uppercase", 1.0)]
    rows = [json.loads(line) for line in (tmp_path / "out.json.rows.jsonl").read_text().splitlines()]
    assert [row["prompt"].upper() for row in rows[:2]] == [row["prompt"] for row in rows[2:]]
    assert rows[0]["answers"] == rows[2]["answers"]
    assert "uppercase:1" in table_of(results, markdown=True)


def test_noise_in_text(place: Path, tmp_path: Path) -> None:
    """As bits per byte of a text that has the noise already."""
    text = str(place / "text.jsonl")
    more = {"noise": ["uppercase", "repeat"], "noise_rates": "0,0.5"}
    found = evaluate_noise(settings_of(place, "blt", "llama", text=[text], **more))["results"]
    kinds = [(None, 0.0), ("uppercase", 0.5), ("repeat", 0.5)]
    assert [(one["noise"], one["rate"]) for one in found] == kinds * 2
    for at, (name, rate) in enumerate(kinds):
        noisy = tmp_path / f"{at}.jsonl"
        changed = [data.decode() if name is None else Noise(name, rate)(data.decode()) for data in TEXTS]
        noisy.write_text("".join(json.dumps({"text": each}) + "\n" for each in changed))
        expected = evaluate_models(settings_of(place, "blt", "llama", text=[str(noisy)]))["models"]
        for own, one in zip(found[at::3], expected, strict=True):
            assert own["bits_per_byte"] == pytest.approx(one["bits_per_byte"], abs=1e-9)
            assert own["num_bytes"] == one["num_bytes"] == sum(len(each.encode()) for each in changed)


def test_documents_left_out_are_named_with_noise(place: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_bytes(b'{"text": "no \xff UTF-8"}\n')
    texts = [str(place / "text.jsonl"), str(tmp_path / "more.jsonl")]
    plain = evaluate_models(settings_of(place, "llama", text=texts))
    noisy = evaluate_noise(settings_of(place, "llama", text=texts, noise=["drop"]))
    assert (noisy["left_out"], noisy["remarks"]) == (1, plain["remarks"])
    assert "UTF-8" in noisy["remarks"][-1]


def test_interrupted_noise_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, text = tmp_path / "out.json", str(place / "text.jsonl")
    more = {"text": [text], "noise": ["drop"], "out": str(out)}
    expected = evaluate_noise(settings_of(place, "byte_lm", **more | {"out": None}))["results"]
    from bytelatent.commands import eval_noise

    real, calls = eval_noise.evaluate_one, []

    def stopped(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(eval_noise, "evaluate_one", stopped)
    with pytest.raises(Interrupted, match="the same command resumes"):
        evaluate_noise(settings_of(place, "byte_lm", **more))
    monkeypatch.setattr(eval_noise, "evaluate_one", real)
    with pytest.raises(UserError, match="was begun with noise="):
        evaluate_noise(settings_of(place, "byte_lm", **more | {"noise": ["repeat"]}))
    resumed = evaluate_noise(settings_of(place, "byte_lm", **more))["results"]
    for one, other in zip(resumed, expected, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_what_is_printed(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, text = tmp_path / "curve.svg", str(place / "text.jsonl")
    more = {"noise": ["drop"], "noise_rates": "0.1,0.3", "figure": str(figure)}
    run(settings_of(place, "blt", text=[text], **more))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["noise", "–", "drop:0.1", "drop:0.3"]
    assert figure.read_text().count("drop") == 1
    for models, column in [(["byte_lm"], "bytes"), (["llama", "blt", "byte_lm"], "bytes per patch or token")]:
        run(settings_of(place, *models, text=[text], noise=["drop"]))
        header, *lines = capsys.readouterr().out.splitlines()[-1 - 2 * len(models) :]
        assert header.split("  ")[-1] == column
        assert [line.endswith("–") for line in lines] == [False] * 4 * (len(models) > 1) + [len(models) > 1] * 2
    run(settings_of(place, "byte_lm", tasks="cute_spell", **more, as_json=True, out=str(tmp_path / "out.json")))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out.json").read_text())
    assert [result["rate"] for result in printed["results"]] == [0, 0.1, 0.3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tasks": "cute", "words": None}, "cute: name words with --words FILE"),
        ({"tasks": "cute_spel"}, "tasks: 'cute_spel' is unknown; did you mean 'cute_spell'?"),
        ({"tasks": "cute_spell,hellaswag"}, "tasks: 'cute_spell' and 'hellaswag' need separate commands"),
        ({"tasks": "cute_sem"}, "cute_sem: it needs pairs of words"),
        ({"tasks": "cute", "words": "absent.txt"}, "words: 'absent.txt' does not exist"),
        ({"tasks": "cute", "samples": 2}, "samples: it has no effect on cute and g2p"),
        ({"tasks": "g2p", "max_bytes": 100}, "max-bytes: it has no effect on cute and g2p"),
        ({"text": ["x"], "noise": ["drop:0"], "figure": "x.svg"}, "figure: it shows scores with noise; its rates are"),
        (
            {"text": ["x"], "noise": ["drop"], "figure": "words.parquet/x.svg"},
            "figure: 'words.parquet/x.svg' cannot be",
        ),
        ({"text": ["x"], "noise": ["drop"], "out": "words.parquet"}, "out: 'words.parquet' holds something already"),
        ({"tasks": "cute", "out": "words.parquet/x"}, "out: 'words.parquet/x' cannot be written"),
        ({"tasks": "cute", "noise": ["dorp"]}, "noise: 'dorp' is unknown; did you mean 'drop'?"),
        ({"tasks": "cute_spell", "noise": ["drop"], "noise_on": "completion"}, "noise-on: the completions of"),
        ({"tasks": "cute_spell", "figure": "x.svg"}, "figure: it shows scores with noise"),
        ({"tasks": "cute_spell", "text": ["x"]}, "tasks: they bring their own text"),
        ({"tasks": "cute", "words": "words.parquet"}, "nothing of 'words.parquet' could be read"),
        ({"text": ["absent.txt"], "noise": ["drop"]}, "'absent.txt' does not exist"),
        ({"text": ["x"], "noise": ["drop"], "by": "category"}, "by: it does not go with --noise"),
        ({"text": ["x"], "noise_rates": "0.1"}, "noise-rates: there is no noise"),
        ({"text": ["x"], "shots": 2}, "shots: it has no effect on TEXT, only on tasks of lm-eval"),
        ({"text": ["x"], "figure": "x.svg"}, "figure: it has no effect on TEXT, only on TEXT with --noise and on"),
        ({"text": ["x"], "noise": ["drop"], "words": "x"}, "words: it has no effect on TEXT with --noise, only on"),
        ({"tasks": "cute", "overlap": 3}, "overlap: it has no effect on cute and g2p, only on TEXT"),
        ({"tasks": "hellaswag", "by": "site", "words": None}, "by: it has no effect on tasks of lm-evaluation-harness"),
        ({"tasks": "cute_spell", "noise_on": "prompt"}, "noise-on: there is no noise"),
    ],
)
def test_bad_input(place: Path, more: dict[str, Any], message: str) -> None:
    Path("words.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(UserError) as caught:
        run(settings_of(place, "blt", **more))
    assert message in str(caught.value)


def test_words_are_those_of_documents(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, seen = place / "words.jsonl", []
    words.write_text(json.dumps({"title": "unwanted", "text": TEXT}) + "\n")
    real = Words.parse
    monkeypatch.setattr(Words, "parse", lambda text, related: seen.append(text) or real(text, related))
    monkeypatch.setattr(eval_characters, "_generator", lambda settings, found: Oracle())
    evaluate_examples(settings_of(place, "blt", tasks="cute_spell").model_copy(update={"words": words}), ["cute_spell"])
    assert seen == [TEXT]


def test_results_stay_without_a_figure(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(eval_characters, "write_noise_figure", fail)
    monkeypatch.setattr(eval_characters, "_generator", lambda settings, found: Oracle())
    out, more = tmp_path / "out.json", {"noise": ["drop:0.001"], "figure": str(tmp_path / "x.svg")}
    for given in ({"tasks": "cute_spell", "out": str(out)}, {"text": [str(place / "text.jsonl")]}):
        with pytest.raises(UserError, match="the disk is full"):
            run(settings_of(place, "byte_lm", **more, **given))
        assert "drop:0.001" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["results"]) == 2


def test_names_of_tasks(caplog: pytest.LogCaptureFixture, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_tasks("cute, hellaswag,g2p,cute") == (["cute", "g2p"], ["hellaswag"])
    monkeypatch.setattr(eval_characters, "_generator", lambda settings, found: Oracle())
    results = evaluate_examples(settings_of(place, "blt"), ["cute"])
    assert "cute_sem" not in {result["task"] for result in results}
    assert len(results) == 13
    assert "cute_sem is left out" in caplog.text
    [mean] = means_of_cute(results)
    assert mean["num_tasks"] == 13
    line = table_of(results, markdown=True).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")][1:3] == ["cute (13 of 14 tasks)", "exact match"]
    assert "54.1" not in line
