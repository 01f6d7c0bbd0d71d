"""A model's chat template goes wherever its weights go."""

from pathlib import Path

import pytest

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.text.chat import CHAT_TEMPLATE, DEFAULT_TEMPLATE, ChatTemplate
from bytelatent.weights import convert, open_pretrained


def test_there_and_back(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "plain")
    assert BLT.from_pretrained(tmp_path / "plain", device="cpu").chat_template is None
    assert not (tmp_path / "plain" / CHAT_TEMPLATE).exists()
    blt.chat_template = DEFAULT_TEMPLATE.source
    assert blt.chat_template == DEFAULT_TEMPLATE
    blt.save_pretrained(tmp_path / "native")
    before = tmp_path / "native"
    for format in ("hf", "meta", "native"):
        folder = tmp_path / f"{format}-again"
        convert(open_pretrained(before), folder, format)
        before = folder
        assert (folder / CHAT_TEMPLATE).read_text() == DEFAULT_TEMPLATE.source
        assert BLT.from_pretrained(folder, device="cpu").chat_template == DEFAULT_TEMPLATE
    with pytest.raises(UserError, match="chat_template: it takes a ChatTemplate"):
        blt.chat_template = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="line 1"):
        blt.chat_template = "{% if %}"


def test_one_that_cannot_be_used(blt: BLT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out with a warning; the model is loaded all the same. Nor is a link followed to a private file."""
    blt.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / CHAT_TEMPLATE).write_text("{% endfor %}")
    found = open_pretrained(tmp_path / "model")
    assert found.chat_template is None
    assert any("line 1" in line and "left out" in line for line in found.warnings)
    (tmp_path / "secret").write_text("{{ 1 }}")
    (tmp_path / "model" / CHAT_TEMPLATE).unlink()
    (tmp_path / "model" / CHAT_TEMPLATE).symlink_to(tmp_path / "secret")
    assert open_pretrained(tmp_path / "model").chat_template is None
    assert ChatTemplate.find(tmp_path) is None
