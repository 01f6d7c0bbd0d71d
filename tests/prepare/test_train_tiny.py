"""setup/train_tiny.py from text to the package's folder, in a step of training for each model."""

import importlib.util
import json
import lzma
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bytelatent import BLT
from bytelatent.errors import UserError

SETUP = Path(__file__).parents[2] / "setup"
SOURCES = {"prose": "austen", "docs": "sqlite-doc", "multilingual": "apache-manual", "code": "go-stdlib"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SETUP))
    monkeypatch.delitem(sys.modules, "build_corpus", raising=False)
    spec = importlib.util.spec_from_file_location("train_tiny", SETUP / "train_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.settings

    def one_step(*arguments: Any, **more: Any) -> Any:
        return made(*arguments, **more).model_copy(update={"steps": 1, "minutes": None})

    monkeypatch.setattr(module, "settings", one_step)
    return module


def test_from_text_to_the_package(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for category, source in SOURCES.items():
        (tmp_path / "work" / "text" / category).mkdir(parents=True)
        for name, times in (("train", 40), ("valid", 3)):
            text = f"A text of the category {category}, which is said again. " * times
            row = json.dumps({"text": text, "source": source, "category": category}) + "\n"
            path = tmp_path / "work" / "text" / category / f"{name}.jsonl.xz"
            path.write_bytes(lzma.compress(row.encode()))
    given = Namespace(work=tmp_path / "work", out=tmp_path / "out", cache=tmp_path, device="cpu", minutes=1)
    script.make(Namespace(**vars(given), text_only=True))  # the text is there, and nothing is fetched
    assert not given.out.exists()
    script.make(Namespace(**vars(given), text_only=False))

    model = BLT.from_pretrained(given.out)
    assert {1, 2, 3, 4} >= {model.model.settings.ngram_hash.num_tables}
    card = (given.out / "README.md").read_text()
    for category, source in SOURCES.items():
        assert f"| {category} | {source} | {script.LICENCES[source]} | 0.0 |" in card
    (bits,) = re.findall(r"^\| BLT \| (.*) \|$", card, re.MULTILINE)
    (held_out,) = re.findall('"text": "(.*?)"', lzma.decompress(path.read_bytes()).decode())  # of the last category
    assert float(bits.split(" | ")[-1]) == pytest.approx(model.bits_per_byte(held_out), abs=2e-3)
    assert "BLT: " in card
    assert "1 steps" in card or "1 step" in card
    assert str(tmp_path) not in card + (given.out / "config.json").read_text()

    monkeypatch.setattr(script, "MOST_BYTES", 1_000_000)
    with pytest.raises(UserError, match="more than 1,000,000; take smaller shapes"):
        script.package(given)
    assert BLT.from_pretrained(given.out).num_parameters() == model.num_parameters()
