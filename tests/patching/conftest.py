"""Rules, packed streams, and tokenizers small enough to train for a test."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bytelatent.patching import PatchSettings

PROSE = """\
When the rain had stopped, the old man went down to the harbour to look at the boats. Most of them had been pulled up
on the sand, and the nets were spread over the stones to dry. He knew every boat by its colour and by the sound that
it made when the wind was in the east. "You are early," said the woman who mended the nets, "and you have not had
your breakfast." He laughed, and sat down beside her on the low wall. For a long time neither of them said anything.
The sea was grey and quiet, and the gulls walked up and down the beach as though they were waiting for somebody.

In the town behind them the bells began to ring. It was the first day of the market, and people came in from the
farms with apples, cheese, eggs and bread; children ran between the carts, and the dogs ran after the children. The
baker opened his windows. A young teacher, who had come from the city only a week before, stood in the middle of the
square and did not know where to go. "Is it always like this?" she asked. "Only on market days," said the baker, "and
when the boats come in. On other days nothing happens at all, and that is how we like it." She bought a loaf that was
still warm and went down to the harbour, where the old man was telling the story of the great storm once again.

Nobody believed the whole of the story, but everybody liked to hear it. There had been seven boats, he said, and the
waves were higher than the church; the light on the island had gone out, and they had found the way home by the smell
of the bread. The woman who mended the nets had heard it a hundred times. She smiled at the teacher and moved a little
to one side, so that there was room for three of them on the wall, and the old man began again from the beginning.
"""

PATCHINGS: dict[str, dict[str, Any]] = {
    "entropy": {"mode": "entropy", "threshold": 1.5},
    "monotonic": {"mode": "entropy", "threshold": 0.5, "monotonicity": True},
    "combined": {"mode": "entropy", "threshold": 1.5, "threshold_add": 0.25},
    "space": {"mode": "space"},
    "static": {"mode": "static", "patch_size": 5},
    "byte": {"mode": "byte"},
    "bpe": {"mode": "bpe"},
}


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        [PROSE], trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        [PROSE], trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of tokenizers of three kinds, by kind."""
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    made = {"byte_level": _byte_level(), "word_piece": _word_piece(), "metaspace": _metaspace()}
    for kind, tokenizer in made.items():
        tokenizer.save(str(folder / f"{kind}.json"))
    return {kind: str(folder / f"{kind}.json") for kind in made}


@pytest.fixture(scope="session", params=[None, 3], ids=lambda longest: f"max={longest}")
def max_patch_length(request: pytest.FixtureRequest) -> int | None:
    return request.param


@pytest.fixture(scope="session", params=PATCHINGS)
def patching(request: pytest.FixtureRequest, tokenizers: dict[str, str], max_patch_length: int | None) -> PatchSettings:
    """Every mode, each with and without a longest patch."""
    values = PATCHINGS[request.param] | {"max_patch_length": max_patch_length}
    if request.param == "bpe":
        values |= {"tokenizer": tokenizers["byte_level"]}
    return PatchSettings.parse(values)
