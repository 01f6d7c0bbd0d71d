"""What `scale.py tables` counts: the bytes that a rank sends for hash tables in a step, however these are divided."""

from pathlib import Path

import torch

from bytelatent.errors import UserError
from bytelatent.kernels.hash_embed import hash_rows, ngram_powers
from bytelatent.model import BLTSettings, ModelSettings
from bytelatent.model.ngram_hash import PRIMES
from bytelatent.model.settings import NgramHashSettings
from bytelatent.vocab import OFFSET

FLOAT32 = 4


def distinct_rows(settings: NgramHashSettings, text: bytes) -> int:
    """The rows that some text looks up, as one document, each counted once."""
    ids = torch.tensor(list(text)) + OFFSET
    powers = ngram_powers(PRIMES[: settings.num_functions], settings.sizes)
    return hash_rows(ids[None], torch.arange(len(ids)), powers, settings.vocab_size, len(ids)).unique().numel()


def sent(settings: BLTSettings, ranks: int, size: int, rows: int) -> dict[str, float]:
    """Bytes that a rank sends, forward and backward.

    Args:
        size: bytes of text on each rank.
        rows: that these look up, distinct.
    """
    assert settings.ngram_hash is not None
    dim, others = settings.encoder.dim, ranks - 1
    all_rows = settings.ngram_hash.num_tables * settings.ngram_hash.vocab_size
    numbers = {"gathered": all_rows * others / ranks, "sums": size * others, "rows": rows * others / ranks}
    return {way: 2 * FLOAT32 * dim * number for way, number in numbers.items()}


def print_sent(settings: ModelSettings, size: int, file: Path | None) -> None:
    """A table of gigabytes by ranks, for rows that are all distinct and those of a text.

    Raises:
        UserError: the text is shorter than a batch, or cannot be read.
    """
    assert isinstance(settings, BLTSettings)
    assert settings.ngram_hash is not None
    torch.manual_seed(0)
    try:
        text = bytes(torch.randint(0, 256, [size]).tolist()) if file is None else file.read_bytes()[:size]
    except OSError as error:
        raise UserError(f"--text: '{file}' cannot be read ({error.strerror}); name another file") from None
    if len(text) < size:
        raise UserError(f"--text: '{file}' holds {len(text):,} bytes, fewer than --bytes {size:,}; take a longer one")
    most, own = settings.ngram_hash.num_tables * size, distinct_rows(settings.ngram_hash, text)
    of_text = f"rows of {file or 'random text'}, {own / most:.2f} distinct"
    print(f"| GPUs | gathered | sums | rows, all distinct | {of_text} |\n| --- | --- | --- | --- | --- |")
    for ranks in (2, 8, 64):
        found = [*sent(settings, ranks, size, most).values(), sent(settings, ranks, size, own)["rows"]]
        print(f"| {ranks} | {' | '.join(f'{figure / 1e9:.3g}' for figure in found)} |")
