"""What the Auto classes find, and that importing this package alone imports no transformers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BltForCausalLM, PretrainedConfig

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.hf import BytelatentConfig, BytelatentForCausalLM, BytelatentTokenizer
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config, save
from tests.hub_server import HubServer
from tests.model.tiny import tiny_byte_lm
from tests.weights.test_hugging_face import random_rows

IDS = random_rows(0, (20,))


@pytest.fixture(scope="module")
def run_folder(blt: BLT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "blt-small"  # a name that transformers takes for its own model type
    blt.save_pretrained(folder / "checkpoints" / "step-00000010")
    (folder / "settings.yaml").write_text("steps: 10\n")
    return folder


def written(blt: BLT, format: str, run_folder: Path, tmp_path: Path) -> Path:
    if format == "run":
        return run_folder
    blt.save_pretrained(tmp_path / "blt-model", format=format)
    return tmp_path / "blt-model"


@pytest.mark.parametrize("format", ["run", "native", "meta"])
def test_every_format_of_ours(blt: BLT, format: str, run_folder: Path, tmp_path: Path) -> None:
    source = written(blt, format, run_folder, tmp_path)
    config = AutoConfig.from_pretrained(source)
    assert type(config) is BytelatentConfig
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_size) == (260, 64, 24)
    model = AutoModelForCausalLM.from_pretrained(str(source))
    assert type(model) is BytelatentForCausalLM
    assert model.name_or_path == str(source)
    assert not model.training
    assert torch.equal(model(IDS).logits, blt.logits(IDS))
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert type(tokenizer) is BytelatentTokenizer
    assert tokenizer.model_max_length == 64
    assert tokenizer("a\u00e9").input_ids == [1, 101, 199, 173]


def test_their_format_stays_theirs(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "theirs", format="hf")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")) is BltForCausalLM
    assert type(AutoTokenizer.from_pretrained(tmp_path / "theirs")) is not BytelatentTokenizer
    ours = BytelatentForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(ours(IDS).logits, blt.logits(IDS))
    assert BytelatentTokenizer.from_pretrained(tmp_path / "theirs")("a").input_ids == [1, 101]


def test_a_repository(blt: BLT, folder: Path, tmp_path: Path) -> None:
    """In a process that may connect; each repository is named so that transformers could take it for its own `blt`.

    What `push_to_hub` uploads is the whole model, the byte LM, too.
    """
    code = (
        "import sys, bytelatent.hf, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "for name in sys.argv[1:]:\n"
        "    assert AutoTokenizer.from_pretrained(name).model_max_length == 64\n"
        "    model = AutoModelForCausalLM.from_pretrained(name, revision='main')\n"
        "    print(model(torch.tensor([[1, 101, 102]])).logits[0, -1].argmax().item())\n"
        "model.push_to_hub('owner/pushed')\n"
        "AutoTokenizer.from_pretrained(name, add_eos_token=True).push_to_hub('owner/pushed')\n"
        "model = AutoModelForCausalLM.from_pretrained('owner/pushed')\n"
        "print(model(torch.tensor([[1, 101, 102]])).logits[0, -1].argmax().item())\n"
        "print(AutoTokenizer.from_pretrained('owner/pushed')('a').input_ids[-1])\n"
    )
    blt.save_pretrained(tmp_path / "meta", format="meta")
    with HubServer() as hub:
        for name, files in (("owner/blt-ours", folder), ("owner/blt-meta", tmp_path / "meta")):
            hub.add(name, files, kind="model")
        environment = os.environ | hub.environment | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment["HF_TOKEN"] = "a-key"
        command = [sys.executable, "-c", code, "owner/blt-ours", "owner/blt-meta"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    expected = int(blt.logits("ab")[0, -1].argmax())
    assert ended.stdout.split() == [*[str(expected)] * 3, "2"]


def test_arguments(blt: BLT, folder: Path, tmp_path: Path) -> None:
    space = {"mode": "space"}
    model = AutoModelForCausalLM.from_pretrained(folder, patching=space, dtype=torch.bfloat16, device_map="cpu")
    assert model.blt.patching == PatchSettings(mode="space")
    assert model.config.patching["mode"] == "space"
    assert model.dtype == torch.bfloat16
    assert model.blt.entropy_model.embedding.weight.dtype == torch.float32
    config = AutoConfig.from_pretrained(folder)
    config.context = 32
    assert AutoModelForCausalLM.from_pretrained(folder, config=config, device_map={"": "cpu"}).blt.context == 32
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    alone = BLT(blt.model, blt.config, None)
    alone.save_pretrained(tmp_path / "alone")
    byte_lm = tmp_path / "byte_lm"
    byte_lm.mkdir()
    save(byte_lm, blt.entropy_model, Config(model=blt.entropy_model.settings, context=64))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", entropy_model=byte_lm)
    assert torch.equal(found(IDS).logits, blt.logits(IDS))


def refused(call: Any, *words: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_refused(folder: Path, tmp_path: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    refused(lambda: load(folder, load_in_8bit=True), "load_in_8bit", "quantize")
    refused(lambda: load(folder, quantise="int8"), "did you mean 'quantize'")
    refused(lambda: load(folder, draft_length=2), "draft_length: speculative decoding was removed")
    refused(lambda: load(folder, device_map={"model": "cpu", "": "cuda"}), "device_map", "one device")
    refused(lambda: load(folder, subfolder="x"), "subfolder")
    refused(lambda: load(folder, patching={"mode": "spaces"}), "patching", "spaces")
    refused(lambda: BytelatentForCausalLM.from_pretrained(tmp_path / "nothing"), "nothing", "is not a folder")
    refused(lambda: BytelatentConfig(model="demo-bl"), "demo-blt")
    refused(lambda: BytelatentConfig(context=0), "context")
    byte_lm = tiny_byte_lm()
    save(tmp_path, byte_lm, Config(model=byte_lm.settings, context=64))
    refused(lambda: load(tmp_path), "byte LM", "name a BLT")
    with pytest.raises((OSError, ValueError)):  # transformers' own
        AutoConfig.from_pretrained(tmp_path / "nothing")


def test_configuration(folder: Path, tmp_path: Path) -> None:
    """What transformers asks of every configuration: it is the same after a file, a text and a dictionary."""
    config = BytelatentConfig.from_pretrained(folder)
    config.name_or_path = ""  # no part of it
    config.save_pretrained(tmp_path)
    for again in (
        BytelatentConfig.from_dict(config.to_dict()),
        BytelatentConfig.from_json_file(tmp_path / "config.json"),
        AutoConfig.for_model(**config.to_dict()),
    ):
        assert again.to_dict() == config.to_dict()
        assert again.ours() == config.ours()
    assert isinstance(config, PretrainedConfig)
    default = BytelatentConfig()
    assert (default.bos_token_id, default.eos_token_id, default.pad_token_id) == (1, 2, 0)
    assert default.patching["mode"] == "space"
    assert BytelatentConfig(entropy_model="demo-byte-lm", output_hidden_states=True).entropy_model["dim"] == 128
    found, unused = BytelatentConfig.from_pretrained(folder, context=9, unknown=1, return_unused_kwargs=True)
    assert (found.context, unused) == (9, {"unknown": 1})


def test_random_weights(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(AutoModelForCausalLM.from_config(config))
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    assert all(weight.isfinite().all() for weight in models[0].parameters())
    assert models[0].blt.entropy_model is not None
    stds = {name: float(weight.detach().std()) for name, weight in models[0].named_parameters() if weight.dim() > 1}
    assert all(0.01 < std < 0.6 for std in stds.values()), stds


def test_nobody_else_imports_transformers() -> None:
    code = "import sys, bytelatent, bytelatent.blt, bytelatent.cli; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import bytelatent.hf"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'bytelatent[transformers]'" in ended.stderr.splitlines()[-1]
