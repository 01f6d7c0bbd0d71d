"""Lazy tensors in files: only headers are read at first, and values are read and written in chunks.

A conversion renames, joins and splits tensors along their first dimension, which needs no values. A `StoredTensor`
therefore only holds where its bytes are, and converting a model of any size takes the memory of one chunk.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bytelatent.errors import UserError

CHUNK_BYTES = 1 << 26
FEW = 12  # names listed in an error
SHARD_BYTES = 5_000_000_000  # limit of a weights file; a larger tensor has a file of its own
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRange:
    """Consecutive bytes of a file; a slice of it is a shorter range."""

    path: Path
    begin: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> "FileRange":
        begin, end, _ = part.indices(self.size)
        return FileRange(self.path, self.begin + begin, end - begin)


@dataclass(frozen=True)
class DrawnRange:
    """Bytes of a tensor that is computed each time that some of them are read."""

    draw: Callable[[], Tensor]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> Tensor:
        return self.draw().reshape(-1).view(torch.uint8)[part]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as pieces along its first dimension: ranges of files, the bytes of tensors in memory, or drawn ones."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[FileRange | Tensor | DrawnRange, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "StoredTensor":
        """Create it from a tensor in memory or in a memory map."""
        return cls(tensor.dtype, tuple(tensor.shape), (tensor.detach().reshape(-1).view(torch.uint8),))

    @classmethod
    def join(cls, parts: Sequence["StoredTensor"]) -> "StoredTensor":
        """Concatenate tensors along the first dimension."""
        first = parts[0]
        assert all(part.dtype == first.dtype and part.shape[1:] == first.shape[1:] for part in parts)
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        return cls(first.dtype, shape, tuple(piece for part in parts for piece in part.pieces))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def split(self, rows: int) -> list["StoredTensor"]:
        """Split into parts of `rows` rows each."""
        assert self.shape[0] % rows == 0
        shape = (rows, *self.shape[1:])
        size = math.prod(shape) * self.dtype.itemsize
        return [
            StoredTensor(self.dtype, shape, tuple(self._pieces_between(number * size, (number + 1) * size)))
            for number in range(self.shape[0] // rows)
        ]

    def _pieces_between(self, begin: int, end: int) -> Iterator[FileRange | Tensor]:
        for piece in self.pieces:
            first, last = max(begin, 0), min(end, len(piece))
            if first < last:
                yield piece[first:last]
            begin, end = begin - len(piece), end - len(piece)

    def chunks(self) -> Iterator[np.ndarray]:
        """Its bytes in order, at most `CHUNK_BYTES` at a time; no number is split."""
        size = max(CHUNK_BYTES // self.dtype.itemsize, 1) * self.dtype.itemsize
        for piece in self.pieces:
            for begin in range(0, len(piece), size):
                part = piece[begin : begin + size]
                yield _read(part) if isinstance(part, FileRange) else part.cpu().numpy()

    def load(self) -> Tensor:
        """Read its values into new memory."""
        out = torch.empty(self.shape, dtype=self.dtype)
        buffer, at = out.reshape(-1).view(torch.uint8).numpy(), 0
        for chunk in self.chunks():
            buffer[at : at + len(chunk)] = chunk
            at += len(chunk)
        return out


def read_weights(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Raises:
        UserError: a file is missing or incomplete.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return read_safetensors(single)
    file_of = read_json_object(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(_is_file_name(file) for file in file_of.values()):
        raise UserError(f"'{index}' does not say which file each tensor is in (weight_map); fetch it again")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        found = read_safetensors(folder / file)
        if elsewhere := [name for name in found if file_of.get(name, file) != file]:
            raise UserError(
                f"'{folder / file}' holds tensors that '{index.name}' places elsewhere: {listed(elsewhere)}; "
                "fetch them again"
            )
        tensors |= found
    if missing := sorted(set(file_of) - set(tensors)):
        raise UserError(f"'{index}' names tensors that its files do not hold: {listed(missing)}; fetch them again")
    return tensors


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first of many names or lines, made printable."""
    first = separator.join(shown(name) for name in names[:FEW])
    return first + (f"{separator}and {len(names) - FEW} more" if len(names) > FEW else "")


def shown(text: str, longest: int = 200) -> str:
    """Text of a file for a message: printable, on one line, not too long."""
    plain = "".join(c if c.isprintable() else " " for c in text[: longest + 1])
    return plain if len(text) <= longest else f"{plain[:longest]}..."


@contextmanager
def _readable(path: Path, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors of reading a file into a UserError; `errors` mean that it is not `what`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist; the folder is not complete, fetch or write it again") from None
    except errors as error:
        why = shown(str(error) or type(error).__name__)
        raise UserError(f"'{path}' is not {what} ({why}); fetch or write it again") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from None


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; only its header is read.

    Raises:
        UserError: the file is missing or incomplete.
    """
    with _readable(path, "a whole safetensors file", SafetensorError, ValueError, RecursionError):
        with safe_open(path, framework="pt"):
            pass  # the library checks the header against itself and against the file size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"'{path}': {shown(name)} is stored as {entry['dtype']}; known are {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        data = FileRange(path, 8 + length + begin, end - begin)
        found[name] = StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), (data,))
    return found


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file written by `torch.save`: a dictionary of tensors, or one under the key `model`.

    Raises:
        UserError: the file is missing or incomplete, or holds other objects than tensors.
    """
    with _readable(path, "a whole file of weights", Exception):  # torch raises many kinds of errors here
        try:
            is_zip = zipfile.is_zipfile(path)  # only these can be mapped into memory
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
        except pickle.UnpicklingError:
            raise UserError(
                f"'{path}' is refused: it is corrupt, or besides tensors it holds Python objects, which could run any "
                "code when read; fetch it again, or get the weights as safetensors"
            ) from None
    tensors = values.get("model", values) if isinstance(values, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"'{path}' holds no tensors by name, neither at the top level nor under 'model'")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in NAMES_OF_DTYPES:
            kind = f"{tensor.dtype} on {tensor.device}, {tensor.layout}".replace("torch.", "")
            raise UserError(f"'{path}': {shown(str(name))} is {kind}; known are plain ones of {', '.join(DTYPES)}")
    return {str(name): StoredTensor.of(tensor) for name, tensor in tensors.items()}


def write_weights(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    shard_bytes: int | None = SHARD_BYTES,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write `model.safetensors`, or shards and their index if there are more than `shard_bytes` (None: never).

    Args:
        advance: called with the number of bytes after each chunk.
    """
    shards = _shards(tensors, shard_bytes)
    file_of = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file_of |= dict.fromkeys(names, f"model{suffix}.safetensors")
        write_safetensors(folder / f"model{suffix}.safetensors", {name: tensors[name] for name in names}, advance)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        write_json_object(folder / "model.safetensors.index.json", index)


def _shards(tensors: Mapping[str, StoredTensor], shard_bytes: int | None) -> list[list[str]]:
    """The names of the tensors of each file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shard_bytes is not None and shards[-1] and filled + tensor.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.num_bytes
    return shards


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], advance: Callable[[int], None]) -> None:
    """Write one file in chunks: the library would need all of it in memory."""
    # Like the library, put wider numbers first, which keeps each tensor aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        if (dtype := NAMES_OF_DTYPES.get(tensor.dtype)) is None:
            raise UserError(
                f"{name} is {tensor.dtype}, which is not supported; convert it to float32 or bfloat16 first"
            )
        begin, end = end, end + tensor.num_bytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in ordered:
            for chunk in tensor.chunks():
                check_finite(name, torch.from_numpy(chunk).view(tensor.dtype))
                file.write(chunk.data)
                advance(len(chunk))


def check_finite(name: str, values: Tensor, where: str = "weights") -> None:
    """Refuse weights with NaN or infinite values, in one pass and without extra memory.

    Args:
        where: the folder of the weights, for the error.
    """
    if values.numel() == 0 or not values.is_floating_point():
        return
    if not all(math.isfinite(extreme) for extreme in torch.stack(values.aminmax()).tolist()):
        raise UserError(
            f"{where}: {shown(name)} holds NaN or infinite values; take an earlier checkpoint, or fetch or write the "
            "weights again"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    with _readable(path, "valid JSON", ValueError, RecursionError):
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # without the byte order mark
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no JSON object; it should be a mapping of keys to values")
    return values


def write_json_object(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _is_file_name(name: Any) -> bool:
    """Whether it is the plain name of a file in the same folder."""
    return isinstance(name, str) and name not in ("", "..") and "\0" not in name and PurePath(name).name == name


def _read(data: FileRange) -> np.ndarray:
    chunk = np.empty(len(data), dtype=np.uint8)
    try:
        with data.path.open("rb") as file:
            file.seek(data.begin)
            if file.readinto(chunk.data) < len(chunk):
                raise UserError(f"'{data.path}' became shorter while it was read; fetch or write it again")
    except OSError as error:
        raise UserError(f"'{data.path}' cannot be read: {error.strerror or error}") from None
    return chunk
