"""Weights that are corrupt, manipulated, of other shapes, or code are refused in one line."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.weights import FORMATS, Config, convert, load_byte_lm, open_pretrained, save
from bytelatent.weights.safetensors_io import read_pickle, read_weights
from tests.weights.published import write_published
from tests.weights.test_hub import Marker

WEIGHTS = "model.safetensors"


def refused(call: Callable[[], object], message: str) -> str:
    with pytest.raises(UserError, match=message) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 4000
    return line


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Rewrite the header of a safetensors file and leave its data."""

    def rewrite(file: Path) -> None:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])

    return rewrite


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def cast(dtype: torch.dtype, name_part: str = "") -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        tensors = {n: t.to(dtype) if name_part in n else t for n, t in load_file(file).items()}
        save_file(tensors, file)

    return rewrite


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "is not a whole safetensors file"),
    "a page": (lambda f: f.write_bytes(b"<html>404 Not Found</html>"), "is not a whole safetensors file"),
    "half": (lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]), "is not a whole safetensors file"),
    "a byte less": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "is not a whole safetensors file"),
    "a byte more": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "is not a whole safetensors file"),
    "a long header": (lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:]), "is not a whole safetensors file"),
    "nested header": (
        lambda f: f.write_bytes((200_000).to_bytes(8, "little") + b"[" * 100_000 + b"]" * 100_000),
        "is not a whole safetensors file",
    ),
    "offsets": (with_header(lambda h: first(h).update(data_offsets=[0, 1])), "is not a whole safetensors file"),
    "below": (with_header(lambda h: first(h).update(data_offsets=[-4, 0])), "is not a whole safetensors file"),
    "shape": (with_header(lambda h: first(h).update(shape=[1, 2, 3])), "is not a whole safetensors file"),
    "dtype": (with_header(lambda h: first(h).update(dtype="F1024")), "is not a whole safetensors file"),
    "reshaped": (
        with_header(lambda h: first(h).update(shape=[1, *first(h)["shape"]])),
        r"is \[1, .*\] where the settings say \[",
    ),
    "int8": (cast(torch.int8, "norm"), "norm.weight is torch.int8, not floating point"),
    "bool": (cast(torch.bool, "norm"), "norm.weight is torch.bool, not floating point"),
    "float8": (cast(torch.float8_e4m3fn, "norm"), "norm.weight is stored as F8_E4M3; known are F64, F32"),
    "complex": (cast(torch.complex64, "norm"), "norm.weight is stored as C64; known are"),
    "nothing": (lambda f: save_file({}, f), r"the settings say \d layers, but its weights are 0 tensors"),
    "half of them": (
        lambda f: save_file(dict(sorted(load_file(f).items())[::2]), f),
        r"missing .*; missing .*; and \d+ more",
    ),
    "others": (lambda f: save_file({f"x{i}": torch.zeros(1) for i in range(900)}, f), r"missing .*and \d+ more"),
    "names": (
        lambda f: save_file({**load_file(f), "\x1b[2J\n" + "x" * 9000: torch.zeros(1)}, f),
        r"unknown \[2J xxx.*\.\.\.$",
    ),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "does not exist|cannot be read|is not a whole"),
    "nowhere": (lambda f: (f.unlink(), f.symlink_to("nowhere")), "does not exist"),
    "a circle": (lambda f: (f.unlink(), f.symlink_to(f.name)), "does not exist|cannot be read|is not a whole"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("format", FORMATS)
def test_safetensors(format: str, damage: str, blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a", format=format)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path / "a" / WEIGHTS)
    line = refused(lambda: BLT.from_pretrained(tmp_path / "a"), message)
    assert str(tmp_path / "a") in line


def test_a_value_that_was_changed(blt: BLT, tmp_path: Path) -> None:
    """Nothing in the file tells; its digest does, which we wrote. It costs nothing to only look."""
    blt.save_pretrained(tmp_path / "a")
    data = bytearray((tmp_path / "a" / "byte_lm" / WEIGHTS).read_bytes())
    data[-2] ^= 1
    (tmp_path / "a" / "byte_lm" / WEIGHTS).write_bytes(data)
    refused(lambda: BLT.from_pretrained(tmp_path / "a"), "byte_lm/model.safetensors is not as it was written")
    assert open_pretrained(tmp_path / "a", weights=False).byte_lm is not None


def sharded(folder: Path) -> tuple[Path, dict[str, Any]]:
    tensors = {"a": torch.zeros(2), "b": torch.ones(3)}
    for number, name in enumerate(tensors, start=1):
        save_file({name: tensors[name]}, folder / f"model-0000{number}-of-00002.safetensors")
    index = {"weight_map": {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(tensors, start=1)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json", index


@pytest.mark.parametrize(
    "file",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "", "sub/model.safetensors", "a\0b", 7, None, ["a"], {"a": "b"}],
)
def test_an_index_that_leads_elsewhere(file: object, tmp_path: Path) -> None:
    index, values = sharded(tmp_path)
    values["weight_map"]["a"] = file
    index.write_text(json.dumps(values))
    refused(lambda: read_weights(tmp_path), "does not say which file each tensor is in")


def test_an_index_and_its_files(tmp_path: Path) -> None:
    index, values = sharded(tmp_path)
    assert read_weights(tmp_path)["b"].load().tolist() == [1, 1, 1]
    for wrong in ([], {}, {"weight_map": []}, {"weight_map": None}):
        index.write_text(json.dumps(wrong))
        refused(lambda: read_weights(tmp_path), "does not say which file|holds no JSON object")
    many = {f"layer.{i}": "model-00001-of-00002.safetensors" for i in range(50_000)}
    index.write_text(json.dumps({"weight_map": {**values["weight_map"], **many}}))
    refused(lambda: read_weights(tmp_path), "names tensors that its files do not hold: .*, and 49988 more; fetch")
    index.write_text(json.dumps(values))
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    refused(lambda: read_weights(tmp_path), "00002-of-00002.safetensors' holds tensors that .* places elsewhere: a;")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(lambda: read_weights(tmp_path), "model-00002-of-00002.safetensors' does not exist")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_finite(
    precision: torch.dtype, place: int, value: float, blt: BLT, tmp_path: Path
) -> None:
    """In any format: refused where they are loaded, and where they are written again."""
    target = tmp_path / "converted"
    for format in FORMATS:
        folder = tmp_path / format
        blt.save_pretrained(folder, format=format)
        tensors = {name: tensor.to(precision) for name, tensor in load_file(folder / WEIGHTS).items()}
        name = next(
            name for name in tensors if ("decoder" in name and "down" in name) or ("decoder" in name and "w2" in name)
        )
        tensors[name].view(-1)[place] = value
        save_file(tensors, folder / WEIGHTS)
        (folder / "complete.json").unlink()
        message = r"decoder\S*weight holds NaN or infinite values"
        line = refused(lambda folder=folder: BLT.from_pretrained(folder, device="cpu", dtype="auto"), message)
        assert str(folder) in line
        refused(lambda folder=folder: convert(open_pretrained(folder), target, "native"), message)
        assert not target.exists()


def test_a_byte_lm_that_is_not_finite(blt: BLT, tmp_path: Path) -> None:
    assert blt.entropy_model is not None
    save(tmp_path, blt.entropy_model, Config(model=blt.entropy_model.settings, context=64))
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["output.weight"][3, 3] = torch.nan
    save_file(tensors, tmp_path / WEIGHTS)
    refused(lambda: load_byte_lm(tmp_path), r"output.weight holds NaN or infinite values")
    save_file(
        {name: tensor.double() * 1e39 for name, tensor in tensors.items() if name != "output.weight"}
        | {"output.weight": torch.zeros(260, 16).double()},
        tmp_path / WEIGHTS,
    )
    assert load_byte_lm(tmp_path).output.weight.dtype == torch.float64
    refused(lambda: load_byte_lm(tmp_path, dtype="float32"), "holds NaN or infinite values")


def test_a_model_in_memory_that_is_not_finite(blt: BLT, tmp_path: Path) -> None:
    with torch.no_grad():
        blt.model.decoder.norm.weight[2] = torch.inf
    refused(lambda: blt.save_pretrained(tmp_path / "a"), "weights: decoder.norm.weight holds NaN or infinite values")
    assert list(tmp_path.iterdir()) == []


class Runs:
    """A shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["value", "beside", "key", "top"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("make", [lambda path: Runs(f"touch '{path}'"), Marker], ids=["system", "call"])
def test_no_code_in_a_pickle_runs(
    make: Callable[[Path], object], kind: str, place: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Wherever it stands in the file, and as whatever torch ever wrote."""
    evil, tensor = make(tmp_path / "ran"), torch.zeros(3)
    values: Any = {
        "value": {"model": {"a": tensor, "b": evil}},
        "beside": {"model": {"a": tensor}, "optimizer": evil},
        "key": {"model": {"a": tensor}, (evil,): 1},
        "top": evil,
    }[place]
    file = tmp_path / "consolidated.pth"
    if kind == "bare":
        file.write_bytes(pickle.dumps(values))
    else:
        torch.save(values, file, _use_new_zipfile_serialization=kind == "zip")
    refused(lambda: read_pickle(file), "consolidated.pth' is refused: .*Python objects, which could run any code")
    assert not (tmp_path / "ran").exists()


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "is not a whole file of weights"),
    "half": (lambda f: (torch.save({"a": torch.zeros(9999)}, f), half(f)), "is not a whole file of weights"),
    "half, legacy": (
        lambda f: (torch.save({"a": torch.zeros(9999)}, f, _use_new_zipfile_serialization=False), half(f)),
        "is not a whole file of weights",
    ),
    "a page": (lambda f: f.write_bytes(b"<html>404</html>"), "is refused: it is corrupt, or"),
    "noise": (lambda f: f.write_bytes(bytes(range(256)) * 9), "is refused: it is corrupt, or|is not a whole file"),
    "a list": (lambda f: torch.save([torch.zeros(1)], f), "holds no tensors by name"),
    "a number": (lambda f: torch.save({"model": {"a": 1}}, f), "holds no tensors by name"),
    "one tensor": (lambda f: torch.save(torch.zeros(1), f), "holds no tensors by name"),
    "below": (lambda f: torch.save({"model": torch.zeros(1)}, f), "holds no tensors by name"),
    "sparse": (lambda f: torch.save({"a": torch.eye(3).to_sparse()}, f), "a is float32 on cpu, sparse_coo; known are"),
    "nowhere": (lambda f: torch.save({"a": torch.zeros(3, device="meta")}, f), "a is float32 on meta, strided"),
    "float8": (lambda f: torch.save({"a": torch.zeros(3).to(torch.float8_e5m2)}, f), "a is float8_e5m2 on cpu"),
    "absent": (lambda f: None, "does not exist; the folder is not complete"),
    "a folder": (lambda f: f.mkdir(), "is not a whole file of weights"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles(what: str, tmp_path: Path) -> None:
    write, message = PICKLES[what]
    write(tmp_path / "consolidated.pth")
    refused(lambda: read_pickle(tmp_path / "consolidated.pth"), message)


@pytest.mark.filterwarnings("ignore")
def test_any_byte_of_a_pickle_may_be_wrong(tmp_path: Path) -> None:
    """It is read, or refused in a line; never a traceback of torch's."""
    file = tmp_path / "consolidated.pth"
    for zipped in (True, False):
        torch.save({"model": {"a": torch.arange(3.0)}}, file, _use_new_zipfile_serialization=zipped)
        data = file.read_bytes()
        generator = torch.Generator().manual_seed(0)
        for at in torch.randint(0, len(data), [150], generator=generator).tolist():
            changed = bytearray(data)
            changed[at] ^= 0xFF
            file.write_bytes(changed)
            line = ""
            try:
                read_pickle(file)
            except UserError as error:
                line = str(error)
            assert line.isprintable()


def test_shapes_of_the_older_format(goldens: Path, tmp_path: Path) -> None:
    folder = write_published(goldens / "blt_k2", tmp_path / "blt", "older")
    tensors = load_file(goldens / "blt_k2" / WEIGHTS)
    name = "encoder_hash_tok_embedding.3.weight"
    for changed, message in (
        ({**tensors, name: tensors[name][:-1]}, rf"{name} is \[1008, 32\] where the settings say \[1009, 32\]"),
        ({**tensors, name: tensors[name].to(torch.bfloat16)}, "encoder_hash_tok_embedding.0.weight and the other"),
        ({**tensors, "rope.freqs": torch.zeros(2)}, "unknown rope.freqs"),
        ({n: t for n, t in tensors.items() if n != name}, f"missing {name}"),
    ):
        torch.save({"model": changed}, folder / "consolidated.pth")
        refused(lambda: open_pretrained(folder), message)
