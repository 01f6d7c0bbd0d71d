"""Models on a hub, through `from_pretrained`, `blt convert` and `blt info`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.errors import UserError
from bytelatent.weights import FORMATS, open_pretrained
from tests.hub_server import HubServer
from tests.weights.published import Format, write_published

IDS = torch.tensor([[1, *(byte + 4 for byte in b"from the hub")]])
NAME, ENTROPY = "published/blt-1b", "published/blt-entropy"


def publish(hub: HubServer, goldens: Path, folder: Path, format: Format = "hub") -> None:
    """A BLT, a separate entropy model, a card and a licence."""
    for name, golden in ((NAME, "blt_k2"), (ENTROPY, "entropy")):
        place = write_published(goldens / golden, folder / name, format)
        (place / "README.md").write_text("---\nlicense: other\nlicense_name: fair\n---\n# Weights\n")
        (place / "LICENSE").write_text(f"the licence of {name}")
        (place / "USE_POLICY.md").write_text("be good")
        (place / "modeling.py").write_text("raise SystemExit('code of a repository ran')")
        hub.add(name, place, kind="model")


def blt_command(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def weights_asked_for(hub: HubServer) -> list[str]:
    return [what for what in hub.requests if what.endswith((".safetensors", ".pth"))]


@pytest.mark.parametrize("format", ["hub", "older"])
def test_published_weights(format: Format, hub: HubServer, goldens: Path, tmp_path: Path) -> None:
    publish(hub, goldens, tmp_path / "repositories", format)
    io = load_file(goldens / "blt_k2" / "io.safetensors")
    found = BLT.from_pretrained(NAME, device="cpu")
    logits = found.logits(io["tokens"].long(), io["patch_lengths"].long())
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)
    assert found.entropy_model is not None
    assert found.entropy_model.settings.window == 512
    assert found.source.startswith(f"{NAME} (Meta's ")
    assert not list((tmp_path / "home").rglob("*.py"))
    hub.close()
    assert BLT.from_pretrained(NAME, device="cpu", local_files_only=True).logits(IDS).equal(found.logits(IDS))


def test_without_the_separate_entropy_model(hub: HubServer, goldens: Path, tmp_path: Path) -> None:
    publish(hub, goldens, tmp_path / "repositories")
    del hub.repositories["model", ENTROPY]
    assert BLT.from_pretrained(NAME, device="cpu").entropy_model is None
    hub.add("another/byte-lm", tmp_path / "repositories" / ENTROPY, kind="model")
    assert BLT.from_pretrained(NAME, entropy_model="another/byte-lm", device="cpu").entropy_model is not None


@pytest.mark.parametrize("format", FORMATS)
def test_what_we_write_can_be_put_there(format: str, blt: BLT, hub: HubServer, tmp_path: Path) -> None:
    """Also as one of several branches."""
    blt.save_pretrained(tmp_path / "a", format=format)
    hub.add("me/mine", tmp_path / "a", kind="model", branch="v1")
    blt.model.decoder.norm.weight.data += 1
    blt.save_pretrained(tmp_path / "b", format=format)
    hub.add("me/mine", tmp_path / "b", kind="model")
    newest, first = (BLT.from_pretrained("me/mine", device="cpu", revision=name) for name in (None, "v1"))
    assert newest.logits(IDS).equal(blt.logits(IDS))
    assert not first.logits(IDS).equal(blt.logits(IDS))
    assert newest.patch("the same bits") == blt.patch("the same bits")
    with pytest.raises(UserError, match=r"me/mine has no revision 'v2'; it has v1, main"):
        BLT.from_pretrained("me/mine", revision="v2")


def test_info_downloads_no_weights(hub: HubServer, goldens: Path, tmp_path: Path) -> None:
    publish(hub, goldens, tmp_path / "repositories")
    found = json.loads(blt_command("info", NAME, "--json"))
    tensors = [*load_file(goldens / "blt_k2" / "model.safetensors").values()]
    of_entropy = [*load_file(goldens / "entropy" / "model.safetensors").values()]
    assert found["num_parameters"] == sum(tensor.numel() for tensor in [*tensors, *of_entropy])
    assert found["flops_per_byte"] > 0
    assert found["patching"]["threshold"] == 1.335442066192627
    assert [part["name"] for part in found["parts"]][-1] == "byte LM (patches)"
    shown = " ".join(blt_command("info", NAME).split())
    for part in ("Meta's hub format", "licence fair", "local encoder: 1 x 32", "patches: entropy, threshold 1.335"):
        assert part in shown
    assert weights_asked_for(hub) == []


@pytest.mark.parametrize("format", FORMATS)
def test_convert(format: str, hub: HubServer, goldens: Path, tmp_path: Path) -> None:
    publish(hub, goldens, tmp_path / "repositories")
    target = tmp_path / "out" / "converted"
    assert blt_command("convert", NAME, target, "--to", format).strip() == str(target)
    published, converted = BLT.from_pretrained(NAME, device="cpu"), BLT.from_pretrained(target, device="cpu")
    assert converted.logits(IDS).equal(published.logits(IDS))
    assert converted.patch("the same bits") == published.patch("the same bits")
    assert (target / "LICENSE").read_text() == f"the licence of {NAME}"
    assert (target / "USE_POLICY.md").read_text() == "be good"
    assert not (target / "modeling.py").exists()
    card = (target / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: fair\n")
    assert f"| converted from | {NAME} (Meta's hub format) |" in card


def test_a_wrong_target_is_refused_before_anything_is_downloaded(hub: HubServer, goldens: Path, tmp_path: Path) -> None:
    publish(hub, goldens, tmp_path / "repositories")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary").write_text("dear diary")
    for options in (["out", "--to", "gguf"], ["notes"], ["out", "--licence", " "]):
        result = CliRunner().invoke(app, ["convert", NAME, str(tmp_path / options[0]), *options[1:]])
        assert (result.exit_code, result.stderr[:7]) == (2, "error: ")
    assert not hub.requests


def test_gated(hub: HubServer, goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, goldens, tmp_path / "repositories")
    for name in (NAME, ENTROPY):
        hub.repositories["model", name].readers = {"hf_reader"}
    for weights in (True, False):
        with pytest.raises(UserError) as caught:
            open_pretrained(NAME, weights=weights)
        assert str(caught.value) == (
            f"{NAME} needs access: open https://huggingface.co/{NAME}, accept the terms, then pass token=..., "
            "set HF_TOKEN, or run: hf auth login"
        )
    with pytest.raises(UserError, match=r"needs access that your token does not have: open https://huggingface.co/"):
        BLT.from_pretrained(NAME, token="hf_another")
    found = BLT.from_pretrained(NAME, token="hf_reader", device="cpu")
    assert found.entropy_model is not None  # the key opens its repository, too
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    blt_command("convert", NAME, tmp_path / "out")
    assert BLT.from_pretrained(tmp_path / "out", device="cpu").logits(IDS).equal(found.logits(IDS))


def test_only_the_entropy_model_is_gated(hub: HubServer, goldens: Path, tmp_path: Path) -> None:
    publish(hub, goldens, tmp_path / "repositories")
    hub.repositories["model", ENTROPY].readers = set()
    with pytest.raises(UserError, match=f"{ENTROPY} needs access: open "):
        BLT.from_pretrained(NAME)


def test_weights_that_were_tampered_with_at_home(hub: HubServer, blt: BLT, tmp_path: Path) -> None:
    """In the cache a file of the right size is taken; what we wrote knows its digests."""
    blt.save_pretrained(tmp_path / "a")
    hub.add("me/mine", tmp_path / "a", kind="model")
    BLT.from_pretrained("me/mine", device="cpu")
    [weights] = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"is not as it was written: model.safetensors is not as it was written"):
        BLT.from_pretrained("me/mine", device="cpu")


def test_pickles_with_code_do_not_run(hub: HubServer, goldens: Path, tmp_path: Path) -> None:
    folder = write_published(goldens / "blt_k2", tmp_path / "blt", "older")
    torch.save({"model": {"weight": Marker(tmp_path / "ran")}}, folder / "consolidated.pth")
    hub.add("bad/blt", folder, kind="model")
    with pytest.raises(UserError, match=r"consolidated.pth' is refused: .* Python objects, which could run any code"):
        BLT.from_pretrained("bad/blt")
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "consolidated.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "there is no model 'nobody/nothing' on the hub"),
        ("runs/demo", "'runs/demo' is not a folder"),
        ("a/b/c", "'a/b/c' is not a folder"),
        ("../up", "'../up' is not a folder"),
        ("~nobody-here/blt", "there is no such user"),
        ("x" * 5000, "cannot be read|is not a folder"),
    ],
)
def test_names(name: str, message: str, hub: HubServer) -> None:
    with pytest.raises(UserError, match=message):
        BLT.from_pretrained(name)
