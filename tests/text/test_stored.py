"""The format of stored entropies and starts: what is written is what is read."""

import errno
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.text import BadRow, read_documents, stored
from bytelatent.text.stored import Stored, pack_starts, read_stored, stored_writer, unpack_starts

PATCHING = {"mode": "entropy", "threshold": 1.5}
ENTROPIES = Stored(byte_lm="0123456789abcdef", window=512, context=8192, dtype="bfloat16")
STARTS = ENTROPIES.model_copy(update={"patching": PATCHING})
ANY_PLACE = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.lists(st.binary(min_size=1, max_size=40), max_size=9)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "GROUP_ROWS", 4)
    monkeypatch.setattr(stored, "GROUP_BYTES", 64)


def write(path: Path, about: Stored, texts: list[bytes], values: list[np.ndarray]) -> Path:
    with stored_writer(path, about) as file:
        for number, (text, row) in enumerate(zip(texts, values, strict=True)):
            file.add(f"doc {number}", text, row)
    return path


def random_entropies(texts: list[bytes], seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.uniform(0, 5.56, len(text) + 1).astype(np.float32) for text in texts]


def random_starts(texts: list[bytes], seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.random(len(text) + 1) < 0.3 for text in texts]


@ANY_PLACE
@given(TEXTS)
def test_entropies_come_back_in_half_precision(tmp_path: Path, small_groups: None, texts: list[bytes]) -> None:
    entropies = random_entropies(texts)
    file = write(tmp_path / "a.parquet", ENTROPIES, texts, entropies)
    read = [document for _, document in read_documents(str(file))]
    assert [(document.id, document.text) for document in read] == [(f"doc {n}", t) for n, t in enumerate(texts)]
    for document, expected in zip(read, entropies, strict=True):
        assert document.starts is None
        np.testing.assert_array_equal(document.entropies, expected.astype(np.float16).astype(np.float32))


@ANY_PLACE
@given(TEXTS)
def test_starts_come_back(tmp_path: Path, small_groups: None, texts: list[bytes]) -> None:
    starts = random_starts(texts)
    read = [d for _, d in read_documents(str(write(tmp_path / "a.parquet", STARTS, texts, starts)))]
    assert [document.text for document in read] == texts
    for document, expected in zip(read, starts, strict=True):
        assert document.entropies is None
        assert document.starts is not None
        assert document.starts.tolist() == expected.tolist()


@given(st.binary(max_size=40).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.booleans(), min_size=len(t) + 1))))
def test_starts_are_a_bit_each(drawn: tuple[bytes, list[bool]]) -> None:
    text, bits = drawn
    starts = np.array(bits[: len(text) + 1])
    packed = pack_starts(starts)
    # By hand: the first start is the highest bit of the first byte.
    digits = "".join(str(int(start)) for start in starts).ljust(8 * len(packed), "0")
    assert packed == int(digits, 2).to_bytes(len(packed), "big")
    assert unpack_starts(packed, len(text)).tolist() == starts.tolist()
    with pytest.raises(ValueError, match="starts for"):
        unpack_starts(packed + b"\0", len(text))


def test_the_columns_and_what_the_file_says_of_them(tmp_path: Path) -> None:
    texts = [b"\xff\x00", b"two"]
    file = write(tmp_path / "a.parquet", ENTROPIES, texts, random_entropies(texts))
    table = pq.read_table(file)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "string"),
        ("text", "binary"),
        ("entropies", "list<element: halffloat not null>"),
    ]
    assert json.loads(table.schema.metadata[b"bytelatent"]) == {
        "version": 1,
        "byte_lm": "0123456789abcdef",
        "window": 512,
        "context": 8192,
        "dtype": "bfloat16",
        "rule": None,
        "source_bytes": None,
    }
    column = pq.ParquetFile(file).metadata.row_group(0).column(1)
    assert column.compression == "ZSTD"
    assert not column.is_stats_set  # they would repeat texts
    assert read_stored(file) == ENTROPIES
    table = pq.read_table(write(tmp_path / "b.parquet", STARTS, texts, random_starts(texts)))
    assert [(field.name, str(field.type)) for field in table.schema][2] == ("starts", "binary")
    assert read_stored(tmp_path / "b.parquet") == STARTS


def test_row_groups_are_bounded_by_rows_and_by_text(tmp_path: Path, small_groups: None) -> None:
    texts = [b"x"] * 6 + [b"y" * 30] * 3 + [b"z" * 100] + [b"w"]
    file = pq.ParquetFile(write(tmp_path / "a.parquet", ENTROPIES, texts, random_entropies(texts)))
    groups = [file.read_row_group(n, columns=["text"])["text"].to_pylist() for n in range(file.num_row_groups)]
    assert [len(group) for group in groups] == [4, 4, 1, 1, 1]
    assert [text for group in groups for text in group] == texts


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    texts = [b"some text", b"and more"]
    one = write(tmp_path / "a.parquet", ENTROPIES, texts, random_entropies(texts))
    other = write(tmp_path / "b.parquet", ENTROPIES, texts, random_entropies(texts))
    assert one.read_bytes() == other.read_bytes()


def test_no_documents_are_a_file_too(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", STARTS, [], [])
    assert read_stored(file) == STARTS
    assert list(read_documents(str(file))) == []


def test_other_parquet_files_have_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert read_stored(tmp_path / "a.parquet") is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"version": 2}', "is of version 2 of this format; upgrade bytelatent"),
        ("{", "has metadata that cannot be read; make it again: blt entropies"),
        ("[1]", "has metadata that cannot be read"),
        ('{"version": 1, "window": "wide"}', "has metadata that cannot be read: .*byte_lm"),
    ],
)
def test_metadata_that_are_not_ours(tmp_path: Path, metadata: str, message: str) -> None:
    table = pa.table({"text": ["a"]}).replace_schema_metadata({"bytelatent": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read_stored(tmp_path / "a.parquet")


def test_no_parquet_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"something else")
    with pytest.raises(BadRow, match="is not a whole Parquet file"):
        read_stored(tmp_path / "a.parquet")


def test_an_error_leaves_nothing(tmp_path: Path, small_groups: None) -> None:
    def fail() -> None:
        with stored_writer(tmp_path / "a.parquet", ENTROPIES) as file:
            for text in [b"text"] * 5:
                file.add("1", text, random_entropies([text])[0])
            assert [place.name for place in tmp_path.iterdir()] != ["a.parquet"]
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file may grow beyond 4 kB; the system says so as it does of a full disk, with another number."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_no_room_is_one_line(tmp_path: Path, little_room: None) -> None:
    texts = [np.random.default_rng(n).bytes(1000) for n in range(20)]
    with pytest.raises(UserError, match=r"a\.parquet' cannot be written: .*too large"):
        write(tmp_path / "a.parquet", ENTROPIES, texts, random_entropies(texts))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match=r"the disk is full: .*a\.parquet' was not written"):
        write(tmp_path / "a.parquet", ENTROPIES, [b"a"], random_entropies([b"a"]))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"a\.parquet' cannot be written"),
        stored_writer(tmp_path / "file" / "a.parquet", ENTROPIES),
    ):
        pass


def test_differences_are_named() -> None:
    other = STARTS.model_copy(update={"byte_lm": "f" * 16})
    assert ENTROPIES.differences(ENTROPIES) == []
    assert ENTROPIES.differences(other) == [
        "byte_lm is 0123456789abcdef there and ffffffffffffffff now",
        f"patching is None there and {PATCHING} now",
    ]
