"""`blt eval TEXT...`: models of bytes and of tokens on the same bytes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bytelatent import BLT
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_text import evaluate_models, run
from bytelatent.errors import Interrupted, UserError
from bytelatent.evaluation import Measured, ReadSettings, TextModel, Texts, bootstrap, find_models, measure_texts
from bytelatent.model import BLTModel, ByteLM, TokenLMSettings, add_patches, build_model, pack_rows
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.text.tokenizer import train_tokenizer
from bytelatent.vocab import encode
from bytelatent.weights import Config, StoredModel, write_model
from tests.training.tiny_runs import BLT as BLT_SHAPE
from tests.training.tiny_runs import byte_lm_run, settings

CONTEXT = 24
ROWS = [
    {"text": "A first text, of the news.", "category": "news"},
    {"text": "def f(x): return x", "category": "code", "meta": {"site": "a.org"}},
    {"text": "ein längerer Text mit vielen Wörtern darin, und noch einigen mehr", "category": "news"},
    {"text": "x", "category": None},
    {"text": "another text <|end|> that spells a special token, and is long, too", "category": "code"},
]
TEXTS = [row["text"].encode() for row in ROWS]
PATCHING = PatchSettings(mode="entropy", threshold=5.2)  # of random weights


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a BLT, its byte LM, and a Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    torch.manual_seed(0)
    kinds = {"byte_lm": {}, "blt": {"model": BLT_SHAPE, "patching": PATCHING.plain()}}
    built: dict[str, Any] = {}
    for name, more in kinds.items():
        built[name] = build_model(settings(byte_lm_run(Path("x"), Path("x"), **more)).model).eval()
        for parameter in built[name].parameters():
            parameter.data.mul_(3)
    byte_lm, blt = built["byte_lm"], built["blt"]
    write_model(StoredModel.of(byte_lm, Config(model=byte_lm.settings, context=CONTEXT)), folder / "byte_lm", "native")
    config = Config(model=blt.settings, context=CONTEXT, patching=PATCHING)
    BLT(blt, config, byte_lm).save_pretrained(folder / "blt")
    save_llama(folder / "llama")
    return folder


def save_llama(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text.decode() for text in TEXTS], trainer)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def evaluated(place: Path, *names: str, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"text": [str(place / "text.jsonl")], "resamples": 0, "device": "cpu", **more}
    return evaluate_models(EvaluateSettings(model=[str(place / name) for name in names], **values))


def slowly(logits_of: Any, ids: Tensor, overlap: int) -> float:
    """The nats of each id after the first, in float64: each from one forward pass over its own window."""
    nats = 0.0
    for at in range(1, len(ids)):  # the id that is predicted
        window = 0 if at <= CONTEXT else -((CONTEXT - at) // (CONTEXT - overlap))  # number of its window
        begin = window * (CONTEXT - overlap)
        logits = logits_of(ids[begin:at])
        nats -= float(logits[-1].double().log_softmax(-1)[ids[at]])
    return nats


def of_bytes(folder: Path, overlap: int) -> float:
    blt = BLT.from_pretrained(folder, device="cpu") if folder.name == "blt" else None
    found: Any = blt.model if blt is not None else None
    if found is None:
        from bytelatent.weights import load

        found = load(folder).model
    found = found.double()
    byte_lm = None if blt is None else blt.entropy_model

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        stream = pack_rows([ids])
        if byte_lm is not None:
            starts = next_starts(ids, byte_lm.entropies(stream), stream.position, PATCHING)
            stream = add_patches(stream, starts)
        assert isinstance(found, BLTModel | ByteLM)
        return found(stream)

    return sum(slowly(logits, torch.from_numpy(encode(text)), overlap) for text in TEXTS)


def of_llama(folder: Path, overlap: int) -> float:
    network = LlamaForCausalLM.from_pretrained(folder).double()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        return network(ids[None]).logits[0]

    rows = [[0, *tokenizer.encode(text.decode()).ids, 0] for text in TEXTS]
    return sum(slowly(logits, torch.tensor(row), overlap) for row in rows)


@pytest.mark.parametrize("overlap", [0, 10])
@pytest.mark.parametrize("name", ["byte_lm", "blt", "llama"])
def test_bits_per_byte_are_those_of_a_slow_computation(place: Path, name: str, overlap: int) -> None:
    found = evaluated(place, name, overlap=overlap, batch_size=50)
    nats = (of_llama if name == "llama" else of_bytes)(place / name, overlap)
    assert found["num_bytes"] == sum(map(len, TEXTS))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["num_bytes"], rel=1e-5)
    assert (found["mean_patch_bytes"] is not None) == (name == "blt")
    assert (found["mean_token_bytes"] is not None) == (name == "llama")


def test_a_token_lm_costs_in_transformers_what_it_costs_here(place: Path) -> None:
    (place / "tokenizer.json").write_text(train_tokenizer(TEXTS, 290))
    torch.manual_seed(2)
    model: Any = build_model(TokenLMSettings(vocab_size=290, dim=32, num_layers=2, num_heads=2, multiple_of=8))
    stored = StoredModel.of(model, Config(model=model.settings, context=CONTEXT))
    stored = replace(stored, tokenizer=place / "tokenizer.json")
    for name in ("native", "hf"):
        write_model(stored, place / f"token_lm_{name}", name)
    for overlap in (0, 7):
        ours, theirs = evaluated(place, "token_lm_native", "token_lm_hf", overlap=overlap)["models"]
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)
        assert ours["mean_token_bytes"] == theirs["mean_token_bytes"] > 1


def test_models_by_category_are_compared_on_the_same_documents(place: Path) -> None:
    (place / "more.jsonl").write_bytes(b'{"text": "no \xff UTF-8", "category": "code"}\n')
    (place / "again.jsonl").write_bytes((place / "text.jsonl").read_bytes() * 3)
    texts = [str(place / "again.jsonl"), str(place / "more.jsonl")]
    found = evaluated(place, "byte_lm", "llama", by="category", text=texts, resamples=50)
    assert (found["left_out"], len(found["remarks"])) == (1, 1)
    first, second = found["models"]
    assert list(first["groups"]) == ["news", "code", "(none)"]
    for model, name in ((first, "byte_lm"), (second, "llama")):
        assert model["num_documents"] == 3 * len(TEXTS)
        assert model["num_bytes"] == 3 * sum(map(len, TEXTS)) == sum(g["num_bytes"] for g in model["groups"].values())
        assert model["bits_per_byte"] == pytest.approx(evaluated(place, name)["bits_per_byte"], rel=1e-6)
        assert model["interval"][0] < model["bits_per_byte"] < model["interval"][1]
    assert second["difference"] == pytest.approx(second["bits_per_byte"] - first["bits_per_byte"])
    assert second["difference_interval"][0] < second["difference"] < second["difference_interval"][1]
    assert first["difference_interval"] == (0, 0)
    assert first["groups"]["(none)"]["interval"] is None  # of three documents
    alone = evaluated(place, "byte_lm", by="source", text=texts)
    assert {name: group["num_documents"] for name, group in alone["groups"].items()} == {texts[0]: 15, texts[1]: 1}
    with pytest.raises(UserError, match=r"by: no document has 'meta.place'"):
        evaluated(place, "byte_lm", by="meta.place")


def test_a_table_is_aligned_or_markdown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {"model": [str(place / "byte_lm"), str(place / "llama")], "resamples": 0, "device": "cpu"}
    run(EvaluateSettings(text=[str(place / "text.jsonl")], by="category", **values))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["group", *2 * ["news"], *2 * ["code"], *2 * ["(none)"], *2 * ["all"]]
    assert {len(line) for line in lines} == {len(lines[0])}
    run(EvaluateSettings(text=[str(place / "text.jsonl")], by="category", markdown=True, **values))
    assert re.split(r"  +", lines[0])[-3:] == ["bytes", "bytes per token", "MFLOPs per byte"]
    assert [line.split()[-1] == "–" for line in lines[1:]] == 4 * [False, True]  # none of one of transformers
    assert [line.split()[-2] == "–" for line in lines[1:]] == 4 * [True, False]
    marked = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in marked]
    assert marked[1].startswith("| :--")
    assert marked[1].endswith("--: |")
    assert [" ".join(row) for row in [cells[0], *cells[2:]]] == [" ".join(line.split()) for line in lines]


def test_the_bootstrap_draws_documents() -> None:
    draw = np.random.default_rng(3)
    num_bytes = draw.integers(50, 150, size=40)
    nats = np.stack([num_bytes * draw.uniform(0.5, 1.5, size=40), num_bytes * draw.uniform(0.8, 1.9, size=40)])
    [own, other], [_, difference] = bootstrap(nats, num_bytes, 2000, seed=1)
    bits: list[list[float]] = [[], [], []]
    for _ in range(2000):
        drawn = [int(draw.integers(40)) for _ in range(40)]
        two = [sum(row[d] for d in drawn) / sum(num_bytes[d] for d in drawn) / math.log(2) for row in nats]
        for values, value in zip(bits, [*two, two[1] - two[0]], strict=True):
            values.append(value)
    for interval, values in zip([own, other, difference], bits, strict=True):
        width = interval[1] - interval[0]
        assert interval == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=width / 10)
    assert bootstrap(nats, num_bytes, 20, seed=1) == bootstrap(nats, num_bytes, 20, seed=1)


def test_an_interrupted_evaluation_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timeless(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: value for key, value in model.items() if key != "seconds"} for model in found["models"]]

    out, more = tmp_path / "results.json", {"batch_size": CONTEXT, "by": "category", "resamples": 20}
    whole = evaluated(place, "byte_lm", "llama", **more)
    measured, nats = TextModel._measured, []

    def stops(self: TextModel, prepared: Any) -> list[float]:
        if len(nats) == stop_after:
            raise KeyboardInterrupt
        nats.append(self.name)
        return measured(self, prepared)

    monkeypatch.setattr(TextModel, "_measured", stops)
    for number in (3, 11):  # within the first model and the second
        stop_after = number
        with pytest.raises(Interrupted, match=r"results.json.rows.jsonl.part', and the same command resumes"):
            evaluated(place, "byte_lm", "llama", out=out, **more)
        assert not out.exists()
    with pytest.raises(UserError, match="was begun with overlap=0, not 5"):
        evaluated(place, "byte_lm", "llama", out=out, overlap=5, **more)
    changed = [*ROWS]
    changed[0] = {**ROWS[0], "text": "Another text."}
    text = (place / "text.jsonl").read_bytes()
    (place / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(UserError, match=r"text.jsonl' row 0 is another text than before"):
        evaluated(place, "byte_lm", "llama", out=out, **more)
    (place / "text.jsonl").write_bytes(text)
    part = tmp_path / "results.json.rows.jsonl.part"
    rows = part.read_bytes()
    part.write_bytes(re.sub(rb'"nats": [0-9.]+', b'"nats": NaN', rows, count=1))
    with pytest.raises(UserError, match="is not what an evaluation writes"):
        evaluated(place, "byte_lm", "llama", out=out, **more)
    part.write_bytes(rows)
    stop_after, before = -1, len(nats)
    found = evaluated(place, "byte_lm", "llama", out=out, **more)
    assert "byte_lm" not in {Path(name).name for name in nats[before:]}  # it was finished
    assert timeless(found) == timeless(whole)
    assert timeless(json.loads(out.read_text())) == json.loads(json.dumps(timeless(whole)))
    rows = [json.loads(line) for line in (tmp_path / "results.json.rows.jsonl").read_text().splitlines()[1:]]
    assert [(row["model"], row["row"]) for row in rows] == [(m, row) for m in (0, 1) for row in range(len(ROWS))]
    with pytest.raises(UserError, match=r"results.json' is there already"):
        evaluated(place, "byte_lm", "llama", out=out, **more)
    out.rename(tmp_path / "moved.json")
    with pytest.raises(UserError, match=r"results.json.rows.jsonl' holds the rows of other results already"):
        evaluated(place, "byte_lm", "llama", out=out, **more)


def test_a_resumed_model_computes_the_batches_of_an_uninterrupted_one(place: Path) -> None:
    [found] = find_models([str(place / "llama")], None, ReadSettings(torch.device("cpu"), batch_ids=2 * CONTEXT))
    model, texts = found.load(), Texts([str(place / "text.jsonl")])
    whole = Measured()
    measure_texts(model, texts, whole)
    for known in range(1, len(TEXTS)):
        resumed = Measured(**{name: values[:known] for name, values in vars(whole).items()})
        measure_texts(model, texts, resumed)
        assert resumed == whole  # to the last bit


def test_options_that_no_model_takes(place: Path, tmp_path: Path) -> None:
    tokenizer = place / "llama"
    llama = find_models([str(place / "llama"), str(place / "blt")], None, how(tokenizer=str(tokenizer)))[0]
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes().replace(b'"r"', b'"R"', 1))
    changed = find_models([str(place / "llama")], None, how(tokenizer=str(tmp_path)))[0]
    assert changed.state != llama.state
    for more, names, message in (
        ({"tokenizer": str(tokenizer)}, ["byte_lm"], r"tokenizer: '.*byte_lm' has no need of it"),
        ({"tokenizer": str(tokenizer)}, ["byte_lm", "blt"], "tokenizer: none of the 2 models has need of it"),
        ({"threshold": 1.0}, ["byte_lm", "llama"], "threshold: none of the 2 models has patches by entropy"),
        ({"entropy_model": "x"}, ["byte_lm", "llama"], "entropy_model: none of the 2 models has patches by entropy"),
    ):
        with pytest.raises(UserError, match=message):
            evaluated(place, *names, **more)


def how(**more: Any) -> ReadSettings:
    return ReadSettings(torch.device("cpu"), **more)


def test_what_cannot_be_measured_is_one_line(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="by: 'a' and 'b' are several; give one"):
        EvaluateSettings.parse({"by": ["a", "b"]})
    assert EvaluateSettings.parse({"by": ["a"]}).by == "a"
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="the text holds no bytes"):
        evaluated(place, "byte_lm", text=[str(tmp_path / "empty.txt")])
    for file in (place / "llama").glob("*"):
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    more: dict[str, Any] = {"text": [str(place / "text.jsonl")]}
    with pytest.raises(UserError, match="holds no tokenizer; name it with --tokenizer"):
        evaluated(tmp_path, "", **more)
    found = evaluated(tmp_path, "", tokenizer=str(place / "llama" / "tokenizer.json"), **more)
    assert found["bits_per_byte"] == pytest.approx(evaluated(place, "llama")["bits_per_byte"])
    with pytest.raises(UserError, match=f"leave no new ones in the context of .*, {CONTEXT}"):
        evaluated(place, "byte_lm", overlap=CONTEXT)
    with pytest.raises(UserError, match="is not a folder"):
        evaluated(place, "byte_lm", "nowhere", text=["nowhere"])
