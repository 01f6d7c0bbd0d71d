import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bytelatent.data import Patcher
from bytelatent.errors import UserError
from bytelatent.evaluation import Cost, PackedModel, Texts
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


def costs(
    model: ByteLM | BLTModel,
    folder: Path,
    batch_ids: int = 4096,
    max_bytes: int | None = None,
    on_batch: Callable[[int], None] = lambda n: None,
    context: int = 64,
) -> list[Cost]:
    patcher = Patcher(PATCHING) if isinstance(model, BLTModel) else None
    reader = PackedModel("tiny", model, torch.device("cpu"), context, batch_ids=batch_ids, patcher=patcher)
    samples = Texts([str(folder)], max_bytes=max_bytes).read()
    return list(reader.costs((sample.document for sample in samples), on_batch))


def bits(found: list[Cost]) -> float:
    return sum(cost.nats for cost in found) / math.log(2) / sum(cost.num_bytes for cost in found)


def test_is_what_each_byte_and_each_end_cost(model: ByteLM | BLTModel, folder: Path) -> None:
    found = costs(model, folder)
    assert bits(found) == pytest.approx(directly(model, TEXTS), rel=1e-5)
    assert [cost.num_bytes for cost in found] == [len(text) for text in TEXTS]


def test_does_not_depend_on_how_documents_are_packed(model: ByteLM | BLTModel, folder: Path) -> None:
    whole, alone = costs(model, folder), costs(model, folder, batch_ids=1)
    assert [cost.nats for cost in whole] == pytest.approx([cost.nats for cost in alone], rel=1e-5)
    assert [cost.num_units for cost in whole] == [cost.num_units for cost in alone]


def test_stops_after_so_much_text(model: ByteLM | BLTModel, folder: Path) -> None:
    found = costs(model, folder, max_bytes=20)
    assert sum(cost.num_bytes for cost in found) == 20
    assert bits(found) == pytest.approx(directly(model, [TEXTS[0], TEXTS[1][:6]]), rel=1e-5)


def test_reports_each_batch(model: ByteLM | BLTModel, folder: Path) -> None:
    shown: list[int] = []
    costs(model, folder, batch_ids=20, on_batch=shown.append, context=20)
    assert sum(shown) == sum(map(len, TEXTS))
    assert len(shown) > 2


def test_groups_are_values_of_keys_and_columns(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "site": "x.org", "meta": {"year": 1999}},
        {"text": "b", "site": None, "meta": {"year": [1]}},
        {"text": "", "site": "y.org"},
        {"text": "c", "site": "y.org", "meta.year": 7},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {key: [row[key] for row in rows] for key in ("text", "site")} | {"year": [1, 2, 3, None]}
    columns["meta"] = [{"site": {"name": name}} for name in "abcd"]
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")

    def groups(by: str, *names: str) -> list[str]:
        return [sample.group for sample in Texts([str(tmp_path / name) for name in names], by=by).read()]

    assert groups("site", "rows.jsonl") == groups("site", "rows.parquet") == ["x.org", "(none)", "y.org"]
    with pytest.raises(UserError, match=r"by: 'meta.year' holds a list in '.*rows.jsonl' row 1"):
        groups("meta.year", "rows.jsonl")
    with pytest.raises(UserError, match=r"by: 'meta' holds an object in .* row 0; .* such as meta.KEY"):
        groups("meta", "rows.jsonl")
    assert groups("year", "rows.parquet") == ["1", "2", "(none)"]
    assert groups("meta.site.name", "rows.parquet") == ["a", "b", "d"]
    with pytest.raises(UserError, match=r"by: 'meta.site' holds an object"):
        groups("meta.site", "rows.parquet")
    with pytest.raises(UserError, match=r"by: no document has 'meta.place', neither the first one"):
        Texts([str(tmp_path)], by="meta.place").check()
    Texts([str(tmp_path)], by="year").check()  # the first file has no such key
    assert groups("source", "") == 3 * ["rows.jsonl"] + 3 * ["rows.parquet"]


def test_what_is_left_out_does_not_count(folder: Path) -> None:
    texts = Texts([str(folder)], max_bytes=20, valid_only=True)
    assert [sample.document.text for sample in texts.read()] == [TEXTS[0], b"x", TEXTS[3][:5]]
    line = f"1 document ({len(TEXTS[1])} bytes) is left out: it is not valid UTF-8, which the tokenizer of 'X' cannot"
    assert texts.remarks("X") == [f"{line} read", "1 empty document is left out"]
    (folder / "bad.jsonl").write_text("{}\n")
    texts = Texts([str(folder)], max_bad_rows=1)
    list(texts.read())
    (folder / "bad.jsonl").unlink()
    assert texts.remarks("X") == ["1 bad row or file is left out", "1 empty document is left out"]


def test_a_cut_is_not_inside_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aä€")
    (tmp_path / "b.txt").write_bytes(b"a\xff\xc3\xa4")
    for name, parts in {
        "a.txt": [b"a", b"a", "aä".encode(), "aä".encode()],
        "b.txt": [b"a", b"a\xff", b"a\xff\xc3"],
    }.items():
        found = [list(Texts([str(tmp_path / name)], max_bytes=size).read()) for size in range(1, len(parts) + 1)]
        assert [sample.document.text for [sample] in found] == parts
