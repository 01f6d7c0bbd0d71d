"""Licences as repositories state them, and the card that goes with what we write."""

from pathlib import Path

import pytest
import yaml

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.patching import Calibration
from bytelatent.weights import FORMATS, Origin, convert, open_pretrained
from bytelatent.weights.side_files import legal_files, stated_licence

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# A\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: fair-research\nlicense_link: LICENSE\n---\n", "fair-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\nlicense: 'a\n\n  b'\n---\n", "a b"),
        ('---\nlicense: "\\e[31mred"\n---\n', " [31mred"),
        ("---\nlicense: ''\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: 7\n---\n", None),
        ("---\nlicense: [1, 2]\n---\n", None),
        ("---\ndate: 2024-99-99\nlicense: mit\n---\n", None),
        ("---\n[: bad\n---\n", None),
        ("---\n- license\n---\n", None),
        (f"---\n{BOMB}license: *j\n---\n", None),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", None),
        ("---\n", None),
        ("", None),
        ("# license: mit\n", None),
    ],
)
def test_the_licence_on_a_card(card: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert stated_licence(tmp_path) == licence
    (tmp_path / "LICENSE.txt").write_text("the text")
    assert stated_licence(tmp_path) == (licence or "see LICENSE.txt")


def test_cards_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\nauthor: \xff\xfe\n---\n\xff")
    assert stated_licence(tmp_path) == "mit"
    (tmp_path / "README.md").unlink()
    assert stated_licence(tmp_path) is None
    (tmp_path / "README.md").mkdir()
    assert stated_licence(tmp_path) is None


def test_legal_files(tmp_path: Path) -> None:
    names = {"LICENSE", "LICENCE.txt", "USE_POLICY.md", "NOTICE", "README.md", "config.json"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "LICENSES").mkdir()
    for name in names:
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "a" / "LICENSE.gone").symlink_to("nowhere")
    found = {file.name: file.read_text() for file in legal_files(tmp_path / "a")}
    assert found == {name: name for name in names - {"README.md", "config.json"}}


def head_of(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_of_what_we_write(format: str, blt: BLT, tmp_path: Path) -> None:
    origin = Origin(training_text=["a.jsonl"], training_bytes=1234567, validation_text=["b"], bits_per_byte=1.5)
    measured = Calibration(
        threshold=5.12, wanted_patch_bytes=4, mean_patch_bytes=4.1, window=6, data="held-out", data_bytes=10
    )
    blt.config = blt.config.model_copy(update={"origin": origin, "calibration": measured})
    blt.save_pretrained(tmp_path / "my-model", format=format, licence="apache-2.0")
    text = (tmp_path / "my-model" / "README.md").read_text()
    head = head_of(tmp_path / "my-model")
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == ("transformers" if format == "hf" else "bytelatent")
    for line in (
        "# my-model",
        "| training text | a.jsonl; 1,234,567 bytes read |",
        "| bits per byte | 1.5000 on b |",
        "| mean patch | 4.10 bytes on held-out |",
        "| licence | apache-2.0 |",
        "| patches | entropy, threshold 5.12 nats |",
        f"| parameters | {sum(weight.numel() for weight in blt.model.parameters()):,} |",
    ):
        assert line in text.splitlines()
    assert ("BltForCausalLM.from_pretrained('my-model')" in text) == (format == "hf")
    assert "BLT.from_pretrained('my-model')" in text
    assert open_pretrained(tmp_path / "my-model").config.origin.licence == "apache-2.0"


@pytest.mark.parametrize(
    "licence", ["fair: research\n# yes", 'a "quoted" \u00e9 one', "mit, apache-2.0", "null", "- x"]
)
def test_any_licence_can_be_stated(licence: str, blt: BLT, tmp_path: Path) -> None:
    """It is the same when it is read from the card alone."""
    blt.save_pretrained(tmp_path / "a", licence=licence)
    said = " ".join(licence.split())
    assert head_of(tmp_path / "a") | {"license": "other", "license_name": said} == head_of(tmp_path / "a")
    assert stated_licence(tmp_path / "a") == said
    with pytest.raises(UserError, match="licence: it is empty"):
        blt.save_pretrained(tmp_path / "b", licence=" \n")


def test_a_licence_is_kept_and_can_be_changed(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a")
    assert "not stated; state one before you publish the weights" in (tmp_path / "a" / "README.md").read_text()
    assert "license" not in head_of(tmp_path / "a")
    assert open_pretrained(tmp_path / "a").in_a_line().endswith("licence not stated")
    (tmp_path / "a" / "NOTICE").write_text("notice")
    (tmp_path / "a" / "LICENSE").write_text("licence")
    convert(open_pretrained(tmp_path / "a"), tmp_path / "b", "hf")
    assert head_of(tmp_path / "b")["license_name"] == "see LICENSE"
    convert(open_pretrained(tmp_path / "b"), tmp_path / "c", "meta", licence="mit")
    assert head_of(tmp_path / "c")["license"] == "mit"
    assert [(tmp_path / "c" / name).read_text() for name in ("NOTICE", "LICENSE")] == ["notice", "licence"]


def test_a_model_in_memory_takes_no_licence_from_the_folder_it_is_saved_from(
    blt: BLT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "LICENSE").write_text("of something else")
    blt.save_pretrained("out")
    assert not (tmp_path / "out" / "LICENSE").exists()
