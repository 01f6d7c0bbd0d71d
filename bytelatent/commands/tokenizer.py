"""`blt tokenizer`: a byte-level BPE for token LMs, trained on text."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bytelatent.commands.options import TokenizerSettings
from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.progress import Progress
from bytelatent.terminal import print_json, print_line
from bytelatent.text import BadRows, find_files, must_have_read, read_documents
from bytelatent.text.documents import forget_logged
from bytelatent.text.tokenizer import Tokenizer, train_tokenizer

LOGGER = logging.getLogger(__name__)
SAMPLE_BYTES = 1_000_000  # of the text, on which tokens are measured


@dataclass
class Trained:
    """What was trained, and on what."""

    out: str
    vocab_size: int
    num_bytes: int = 0
    bad_rows: int = 0
    mean_token_bytes: float = 0.0  # on the first megabyte of the text
    sha256: str = ""


def run(settings: TokenizerSettings) -> None:
    trained, unread = train_on_text(settings)
    if settings.as_json:
        print_json(asdict(trained))
    else:
        print_line(
            f"{trained.vocab_size:,} ids from {trained.num_bytes:,} bytes, {trained.mean_token_bytes:.2f} bytes per "
            f"token -> {trained.out}"
        )
    must_have_read(unread)


def train_on_text(settings: TokenizerSettings) -> tuple[Trained, dict[str, str]]:
    """Train a tokenizer and write its file.

    Returns:
        What was trained, and the files of which nothing could be read, each with the reason.

    Raises:
        UserError: there is no text, there are too many bad rows, or the file is there already.
    """
    forget_logged()
    out = Path(settings.out).expanduser()
    if out.exists():
        raise UserError(f"out: '{out}' is there already; name another file, or move it away")
    bad, trained, sample = BadRows(settings.max_bad_rows), Trained(str(out), settings.vocab), list[bytes]()
    files = [file for path in settings.text for file in find_files(path)]
    rows = {"bad_rows": bad, "stored": False, "max_row_bytes": settings.max_row_bytes}

    def documents() -> Iterator[bytes]:
        for file in files:
            for _, document in read_documents(file, settings.text_key, **rows):
                text = document.text
                if settings.max_bytes is not None:
                    text = text[: settings.max_bytes - trained.num_bytes]
                if trained.num_bytes < SAMPLE_BYTES:
                    sample.append(text[:SAMPLE_BYTES])
                trained.num_bytes += len(text)
                progress.advance(len(text))
                yield text
                if settings.max_bytes is not None and trained.num_bytes >= settings.max_bytes:
                    return

    num_stored = sum(Path(file).stat().st_size for file in files)  # about as many as of text
    total = num_stored if settings.max_bytes is None else min(settings.max_bytes, num_stored)
    with Progress("tokenizer", total, about=True) as progress:
        text = train_tokenizer(documents(), settings.vocab)
    if not trained.num_bytes:
        must_have_read(bad.unread)
        raise UserError("tokenizer: the text holds no bytes")
    tokenizer = Tokenizer(text, str(out))
    num_tokens = sum(len(tokenizer.encode(part, bos=False, eos=False)) for part in sample)
    trained.mean_token_bytes = sum(map(len, sample)) / num_tokens
    trained.vocab_size, trained.bad_rows = tokenizer.size, bad.count
    if trained.vocab_size < settings.vocab:
        LOGGER.warning(
            f"vocab: the text holds no more than {trained.vocab_size:,} of {settings.vocab:,} ids, as no further pair "
            f"comes twice; give more text, or train with model.vocab_size={trained.vocab_size}"
        )
    trained.sha256 = hashlib.sha256(text.encode()).hexdigest()
    with whole_file(out) as aside:
        aside.write_text(text, encoding="utf-8")
    return trained, bad.unread
