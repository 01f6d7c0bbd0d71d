import math
from pathlib import Path

import pytest
import torch

from bytelatent.data import Patcher, SourceSettings, batches_once
from bytelatent.errors import UserError
from bytelatent.evaluation import Evaluation, evaluate
from bytelatent.model import BLTModel, ByteLM, add_patches, build_model, pack_rows
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.vocab import encode
from tests.training.tiny_runs import BLT, byte_lm_run, settings

TEXTS = [b"The first one.", b"\xff\xfe no UTF-8", b"x", "ein längerer Text, mit vielen Wörtern darin".encode()]
PATCHING = PatchSettings(mode="space")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each text, and one that holds none."""
    place = tmp_path_factory.mktemp("documents")
    for number, text in enumerate(TEXTS):
        (place / f"{number}.txt").write_bytes(text)
    (place / "empty.txt").touch()
    return place


@pytest.fixture(params=["byte LM", "BLT", "BLT as published"])
def model(request: pytest.FixtureRequest) -> ByteLM | BLTModel:
    more = {} if request.param == "byte LM" else {"model": BLT, "patching": {"mode": "space"}}
    if request.param == "BLT as published":
        more["model"] = BLT | {"ngram_hash": {**BLT["ngram_hash"], "stop_at_document": False}}
    torch.manual_seed(0)
    built = build_model(settings(byte_lm_run(Path("x"), Path("x"), **more)).model)
    assert isinstance(built, ByteLM | BLTModel)
    for parameter in built.parameters():
        parameter.data.mul_(3)  # so that some bytes are much likelier than others
    return built


def directly(model: ByteLM | BLTModel, texts: list[bytes]) -> float:
    """Bits per byte, one document and one target at a time."""
    bits = 0.0
    for text in texts:
        ids = torch.from_numpy(encode(text))
        stream = pack_rows([ids[:-1]])
        if isinstance(model, BLTModel):
            stream = add_patches(stream, next_starts(stream.ids, None, stream.position, PATCHING))
        with torch.no_grad():
            probabilities = model(stream).double().softmax(-1)  # type: ignore[arg-type]
        for place, target in enumerate(ids[1:].tolist()):  # the last of them is EOS
            bits -= math.log2(float(probabilities[place, target]))
    return bits / sum(map(len, texts))


def evaluated(
    model: ByteLM | BLTModel, folder: Path, batch_bytes: int = 4096, max_bytes: int | None = None
) -> Evaluation:
    patcher = Patcher(PATCHING) if isinstance(model, BLTModel) else None
    return evaluate(model, batches_once([SourceSettings(path=str(folder))], 512, batch_bytes, patcher, max_bytes))


def test_is_what_each_byte_and_each_end_cost(model: ByteLM | BLTModel, folder: Path) -> None:
    found = evaluated(model, folder)
    assert found.bits_per_byte == pytest.approx(directly(model, TEXTS), rel=1e-5)
    assert found.num_bytes == sum(map(len, TEXTS))


def test_does_not_depend_on_how_documents_are_packed(model: ByteLM | BLTModel, folder: Path) -> None:
    whole = evaluated(model, folder)
    # Of documents only: a piece that is cut to fit a batch is read without what came before it.
    longest = max(map(len, TEXTS)) + 1
    alone = [evaluated(model, folder / f"{number}.txt", longest) for number in range(len(TEXTS))]
    bits = sum(one.bits_per_byte * one.num_bytes for one in alone) / sum(one.num_bytes for one in alone)
    assert whole.bits_per_byte == pytest.approx(bits, rel=1e-5)
    if whole.mean_patch_bytes is not None:
        patches = sum(one.num_bytes / (one.mean_patch_bytes or 1) for one in alone)
        assert whole.mean_patch_bytes == pytest.approx(whole.num_bytes / patches)


def test_stops_after_so_much_text(model: ByteLM | BLTModel, folder: Path) -> None:
    found = evaluated(model, folder, max_bytes=20)
    assert found.num_bytes == 20
    assert found.bits_per_byte == pytest.approx(directly(model, [TEXTS[0], TEXTS[1][:6]]), rel=1e-5)


def test_reports_each_batch(model: ByteLM | BLTModel, folder: Path) -> None:
    shown: list[int] = []
    patcher = Patcher(PATCHING) if isinstance(model, BLTModel) else None
    evaluate(model, batches_once([SourceSettings(path=str(folder))], 512, 20, patcher), on_batch=shown.append)
    assert sum(shown) == sum(map(len, TEXTS))
    assert len(shown) > 2


def test_no_text_is_one_line(model: ByteLM | BLTModel, folder: Path) -> None:
    with pytest.raises(UserError, match="holds no bytes"):
        evaluated(model, folder / "empty.txt")
