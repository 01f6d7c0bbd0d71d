"""A token LM in transformers: the same logits and the same bits per byte, and back again."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bytelatent.data import pack, split_document
from bytelatent.errors import UserError
from bytelatent.evaluation.load import ReadSettings, find_model
from bytelatent.model import TokenLMSettings, pack_rows
from bytelatent.model.loss import bits_per_byte, cross_entropy
from bytelatent.text import Document
from bytelatent.text.tokenizer import TOKENIZER, train_tokenizer
from bytelatent.weights import Config, StoredModel, convert, load, open_pretrained, write_model
from tests.model.tiny import make

TEXT = "the cat sat on the mat, and then the größere cat went over the mat <s>. "
SETTINGS = TokenLMSettings(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, multiple_of=8, vocab_size=304)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A model, its folder in our format and that in transformers'."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / TOKENIZER).write_text(train_tokenizer([TEXT.encode()] * 9, 300))
    model = make(SETTINGS)
    stored = replace(StoredModel.of(model, Config(model=SETTINGS, context=40)), tokenizer=folder / TOKENIZER)
    write_model(stored, folder / "own", "native")
    convert(open_pretrained(folder / "own"), folder / "theirs", "hf")
    return model, folder / "own", folder / "theirs"


def test_logits_and_bits_per_byte(exported: tuple[Any, Path, Path]) -> None:
    model, own, theirs = exported
    llama, tokenizer = AutoModelForCausalLM.from_pretrained(theirs), AutoTokenizer.from_pretrained(theirs)
    assert isinstance(llama, LlamaForCausalLM)
    vocabulary = load(own).vocabulary
    ids = torch.from_numpy(vocabulary.encode(TEXT, eos=False))
    assert tokenizer(TEXT).input_ids == ids.tolist()
    assert tokenizer.decode(ids[1:]) == TEXT
    with torch.no_grad():
        found = llama(ids[None]).logits[0]
        torch.testing.assert_close(found, model(pack_rows([ids])), atol=1e-5, rtol=1e-5)
        whole = torch.tensor([*ids.tolist(), tokenizer.eos_token_id])[None]
        nats = float(llama(whole, labels=whole).loss) * (whole.shape[1] - 1)
    pieces = list(split_document(Document(TEXT.encode()), 1000, vocabulary))
    batch = pack(pieces, vocabulary=vocabulary)
    assert batch.num_bytes == len(TEXT.encode())
    with torch.no_grad():
        found = bits_per_byte(float(cross_entropy(model, batch)), batch.num_bytes)
    assert found == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_back_to_ours(exported: tuple[Any, Path, Path], tmp_path: Path) -> None:
    model, own, theirs = exported
    convert(open_pretrained(theirs), tmp_path / "back", "native")
    back, before = load(tmp_path / "back"), load(own)
    assert back.config.model == before.config.model == SETTINGS
    assert back.config.context == 40
    assert back.vocabulary.encode(TEXT).tolist() == before.vocabulary.encode(TEXT).tolist()
    for name, value in model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], value)


def test_another_tokenizer_is_refused(exported: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """One whose ids fit; the same one in another layout, or with a token for padding, is taken."""
    _, own, theirs = exported
    how = ReadSettings(torch.device("cpu"))
    text, other = (own / TOKENIZER).read_text(), train_tokenizer([b"something else, something more"] * 9, 300)
    values = json.loads(text)
    values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
    values["added_tokens"].append({**values["added_tokens"][-1], "id": 303, "content": "<pad>"})
    for folder in (own, theirs):
        copy = shutil.copytree(folder, tmp_path / folder.name)
        (copy / TOKENIZER).write_text(json.dumps(values))
        find_model(str(copy), None, how)
        (copy / TOKENIZER).write_text(other)
        for read in (open_pretrained, lambda place: find_model(str(place), None, how)):
            with pytest.raises(UserError, match=r"tokenizer: '.*tokenizer.json' is not the one that the model"):
                read(copy)
        (copy / TOKENIZER).rename(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"tokenizer: '.*other.json' is not the one that the model was trained with"):
        find_model(str(tmp_path / "own"), None, replace(how, tokenizer=str(tmp_path / "other.json")))
    find_model(str(tmp_path / "own"), None, replace(how, tokenizer=str(own)))


def test_a_llama_that_others_made(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "vocab_size": 300}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1)).eval()
    llama.save_pretrained(tmp_path)
    found = load(tmp_path)
    ids = torch.randint(0, 300, [30])
    with torch.no_grad():
        torch.testing.assert_close(found.model(pack_rows([ids])), llama(ids[None]).logits[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"has no tokenizer\.json, which a token LM needs"):
        _ = found.vocabulary
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_bias": True}))
    with pytest.raises(UserError, match="attention_bias is True; only False is known here"):
        open_pretrained(tmp_path)


def test_what_a_llama_cannot_do(exported: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, own, _ = exported
    stored = open_pretrained(own)
    narrow = SETTINGS.model_copy(update={"window": 8})
    with pytest.raises(UserError, match="sees the whole document, and this model a window of 8 ids"):
        write_model(replace(stored, config=stored.config.model_copy(update={"model": narrow})), tmp_path / "a", "hf")
    with pytest.raises(UserError, match="meta: Meta's format has no token LM"):
        convert(stored, tmp_path / "b", "meta")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        write_model(replace(stored, tokenizer=None), tmp_path / "c", "native")
