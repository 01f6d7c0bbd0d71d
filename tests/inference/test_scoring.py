"""Scores in one pass against the whole forward pass of prompt and continuation together."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.inference import Decoder, scoring
from bytelatent.inference.scoring import (
    Item,
    Pair,
    _by_prefix,
    _passes,
    log_probabilities,
    log_probabilities_of_pairs,
    scored_pairs,
)
from bytelatent.inference.step import PrefillDecoder
from bytelatent.patching import PatchSettings
from bytelatent.vocab import encode
from tests.inference.test_decoder import PATCHINGS, assert_close, full_logits
from tests.inference.test_engine import NAMES, decoder_of
from tests.model.tiny import blt_settings, byte_lm_settings, make, random_ids, random_lines, tiny_blt, tiny_byte_lm

BOS = torch.tensor([1])


def slow_scores(decoder: Decoder, pairs: Sequence[Pair], greedy: list[bool] | None = None) -> list[float]:
    """Of each pair alone, by the models' own forward passes.

    Args:
        greedy: takes whether each id of each pair is the most likely one.
    """
    scores = []
    for prompt, text in pairs:
        [logits] = full_logits(decoder, [torch.cat([prompt, text])])
        predicting = logits[len(prompt) - 1 : len(prompt) + len(text) - 1].double().log_softmax(-1)
        scores.append(float(predicting.gather(1, text[:, None]).sum()))
        if greedy is not None:
            greedy.append(bool((predicting.argmax(-1) == text).all()))
    return scores


def check(decoder: Decoder, pairs: list[Pair]) -> None:
    found, expected = log_probabilities_of_pairs(decoder, pairs), slow_scores(decoder, pairs)
    assert found == pytest.approx(expected, abs=1e-4, rel=0)


def drawn_pairs(data: st.DataObject, seed: int) -> list[Pair]:
    """A few prompts, one of them BOS alone perhaps, each with several continuations, in any order."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for size in data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3)):
        prompt = torch.cat([BOS, random_lines(generator, size)])
        sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
        pairs += [(prompt, random_lines(generator, length)) for length in sizes]
    return data.draw(st.permutations(pairs))


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups end after a few ids, and some continuations are too long for one."""
    monkeypatch.setattr(scoring, "PASS_IDS", 20)
    monkeypatch.setattr(scoring, "PROMPT_IDS", 40)


@given(
    settings=blt_settings(), byte_lm=byte_lm_settings(), patching=PATCHINGS, seed=st.integers(0, 1000), data=st.data()
)
def test_scores_are_those_of_the_full_forward(
    settings: Any, byte_lm: Any, patching: PatchSettings, seed: int, data: st.DataObject
) -> None:
    check(Decoder(make(settings, seed), patching, make(byte_lm, seed)), drawn_pairs(data, seed))


@pytest.mark.usefixtures("small_passes")
@settings(max_examples=15)
@given(
    settings=blt_settings(), byte_lm=byte_lm_settings(), patching=PATCHINGS, seed=st.integers(0, 1000), data=st.data()
)
def test_in_groups(settings: Any, byte_lm: Any, patching: PatchSettings, seed: int, data: st.DataObject) -> None:
    check(Decoder(make(settings, seed), patching, make(byte_lm, seed)), drawn_pairs(data, seed))


@settings(max_examples=15)
@given(byte_lm=byte_lm_settings(), seed=st.integers(0, 1000), data=st.data())
def test_scores_of_a_byte_lm(byte_lm: Any, seed: int, data: st.DataObject) -> None:
    check(Decoder(make(byte_lm, seed), None, None), drawn_pairs(data, seed))


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_that_prompts_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SHARED_IDS", 8)
    decoder, generator = decoder_of(name), torch.Generator().manual_seed(2)
    begin = torch.cat([BOS, random_ids(generator, 40)])
    prompts = [torch.cat([begin[:cut], random_ids(generator, size)]) for cut in (1, 23, 41) for size in (0, 1, 19)]
    pairs = [(prompt, random_ids(generator, size)) for prompt in prompts for size in (1, 9)]
    pairs += [(prompt, next_ids(decoder, prompt, 3)) for prompt in prompts]  # greedy ones
    check(decoder, pairs)
    greedy: list[bool] = []
    slow_scores(decoder, pairs, greedy)
    assert [score.is_greedy for _, score in sorted(scored_pairs(decoder, pairs))] == greedy
    assert sum(greedy) >= len(prompts)


def next_ids(decoder: Decoder, prompt: Tensor, count: int) -> Tensor:
    """The most likely ids after a prompt, one after another."""
    ids = prompt
    for _ in range(count):
        [logits] = full_logits(decoder, [ids])
        ids = torch.cat([ids, logits[-1:].argmax(-1)])
    return ids[len(prompt) :]


def test_which_prefixes_are_read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SHARED_IDS", 3)
    texts = ["abcd1", "abcd12", "abcd2", "abx", "zyxwv", "zyxwvu", "zzzzzz"]
    found = [(size, len(group)) for size, group in _by_prefix([tuple(text.encode()) for text in texts])]
    assert found == [(4, 3), (0, 1), (4, 2), (0, 1)]  # each leaves an id to read after the prefix


@pytest.mark.parametrize("name", NAMES)
def test_after_prompts_read_the_way_a_gpu_does(name: str) -> None:
    plain, generator = decoder_of(name), torch.Generator().manual_seed(1)
    decoder = PrefillDecoder(plain.model, plain.patching, plain.byte_lm)
    prompts = [torch.cat([BOS, random_ids(generator, size)]) for size in (0, 17, 40)]
    check(decoder, [(prompt, random_ids(generator, size)) for prompt in prompts for size in (1, 9, 0, 25)])


def test_tokens_that_go_on_from_the_prompt(tmp_path: Path) -> None:
    """The mode `bpe` decides by what a tokenizer makes of the bytes before, those of the prompt included."""
    tokenizers = pytest.importorskip("tokenizers")
    prose = "the theory of the other theme, and then the weather there " * 4
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([prose], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    patching = PatchSettings(mode="bpe", tokenizer=str(tmp_path / "tokenizer.json"), max_patch_length=6)
    ids = torch.from_numpy(encode(prose, eos=False))
    check(
        Decoder(tiny_blt(window=6), patching, None),
        [(ids[:cut], ids[cut : cut + size]) for cut in (1, 4, 11, 90) for size in (3, 30)],
    )


def test_one_pass_whatever_their_number() -> None:
    """All continuations of a prompt cost each part of the model one call, and the prompt one more."""
    model, byte_lm = tiny_blt(window=6), tiny_byte_lm(window=6)
    calls: Counter[str] = Counter()
    parts = {"byte LM": byte_lm.stack, "global": model.global_transformer, "decoder": model.decoder.stack.blocks[0]}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.cat([BOS, random_ids(generator, 30)])
    texts = [random_ids(generator, size) for size in range(2, 30)]
    log_probabilities(Decoder(model, PatchSettings(threshold=5.12), byte_lm), prompt, texts)
    assert calls == dict.fromkeys(parts, 2)


def test_continuations_leave_no_trace() -> None:
    decoder = decoder_of("split")
    generator = torch.Generator().manual_seed(0)
    prompt, after = torch.cat([BOS, random_ids(generator, 30)]), random_ids(generator, 20)
    state, _ = decoder.prefill([prompt])
    decoder.branch(state, [0, 0], [random_ids(generator, 25), random_ids(generator, 3)])
    [expected] = full_logits(decoder, [torch.cat([prompt, after])])
    assert_close(decoder.extend(state, torch.zeros(20, dtype=torch.long), after), expected[len(prompt) :])


@given(sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(2, 900)), max_size=30))
def test_passes_are_bounded(sizes: list[tuple[int, int]]) -> None:
    """Every text is in one; none is larger when laid out in rows, but for one text alone, or could take the next."""
    sizes = sorted(sizes, key=lambda one: one[0])
    texts = {number: torch.zeros(size * 2) for number, (_, size) in enumerate(sizes)}
    items = [(row, number) for number, (row, _) in enumerate(sizes)]
    opened = [0, 5, 300, 2000]
    passes = list(_passes(items, texts, opened))
    assert [item for group in passes for item in group] == items

    def size(group: list[Item]) -> int:
        read: Counter[int] = Counter()
        for row, number in group:
            read[row] += len(texts[number]) - 1 + opened[row]
        return len(read) * max(read.values())

    assert all(len(group) == 1 or size(group) <= scoring.PASS_IDS for group in passes)
    assert all(size([*one, other[0]]) > scoring.PASS_IDS for one, other in pairwise(passes))


def test_no_pairs_and_no_ids() -> None:
    decoder = decoder_of("entropy")
    empty: Tensor = torch.zeros(0, dtype=torch.long)
    assert log_probabilities(decoder, BOS, []) == []
    assert log_probabilities(decoder, BOS, [empty, empty]) == [0.0, 0.0]
