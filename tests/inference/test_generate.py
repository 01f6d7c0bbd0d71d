"""Generation against the plain forward pass."""

import pytest
import torch

from bytelatent.inference import Sampling, generate_ids
from bytelatent.model import BLTModel, ByteLM, add_patches
from bytelatent.patching import PatchSettings
from bytelatent.vocab import EOS, encode
from tests.model.tiny import stream_of, tiny_blt, tiny_byte_lm

PROMPTS = ["The", "", "a longer prompt than the others", "it"]
GREEDY = Sampling(temperature=0)
RULE = PatchSettings(mode="entropy", threshold=5.12)
Models = tuple[BLTModel | ByteLM, PatchSettings | None, ByteLM | None]


def models(seed: int = 0) -> dict[str, Models]:
    byte_lm = tiny_byte_lm(seed, window=6)
    return {
        "byte LM": (byte_lm, None, None),
        "entropy": (tiny_blt(seed, window=6), RULE, byte_lm),
        "published hashes": (tiny_blt(seed, window=6, stop_at_document=False), RULE, byte_lm),
        "static": (tiny_blt(seed, window=6), PatchSettings(mode="static", patch_size=3), None),
    }


def rows_of(prompts: list[str]) -> list[torch.Tensor]:
    return [torch.from_numpy(encode(prompt, eos=False)) for prompt in prompts]


def generated(chosen: Models, prompts: list[str], count: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for drawn in generate_ids(*chosen, rows_of(prompts), count, sampling):
        assert len(drawn) == len(prompts)
        for row, i in zip(out, drawn, strict=True):
            if i is not None:
                assert not row or row[-1] != EOS  # nothing comes after the end
                row.append(i)
    return out


def slow_greedy(chosen: Models, prompt: str, count: int) -> list[int]:
    """The likeliest id again and again. The rules are spelt out: an entropy above the threshold, or every three ids."""
    model, _, byte_lm = chosen
    ids = encode(prompt, eos=False).tolist()
    read = len(ids)
    for _ in range(count):
        stream = stream_of([torch.tensor(ids)])
        with torch.no_grad():
            if isinstance(model, ByteLM):
                logits = model(stream)
            elif byte_lm is not None:
                log_p = byte_lm(stream).log_softmax(-1)
                entropies = -(log_p.exp() * log_p).sum(-1)
                logits = model(add_patches(stream, (entropies > 5.12) | (stream.position == 0)))
            else:
                logits = model(add_patches(stream, (stream.position + 1) % 3 == 0))
        last = logits[-1].tolist()
        ids.append(max((i for i in range(260) if i == EOS or i > 3), key=lambda i: last[i]))
        if ids[-1] == EOS:
            break
    return ids[read:]


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_rows_as_each_alone(name: str, seed: int) -> None:
    chosen = models(seed)[name]
    together = generated(chosen, PROMPTS, 12)
    assert together == [generated(chosen, [prompt], 12)[0] for prompt in PROMPTS]
    assert together == [slow_greedy(chosen, prompt, 12) for prompt in PROMPTS]
    assert generated(chosen, [PROMPTS[2], PROMPTS[2]], 12) == [together[2]] * 2
    assert all(len(row) == 12 or row[-1] == EOS for row in together)
    assert len({tuple(row) for row in together}) > 1


@pytest.mark.parametrize("name", models())
def test_rows_that_are_sampled_as_each_alone(name: str) -> None:
    chosen, sampling = models()[name], Sampling(temperature=1.0, seed=5)
    together = generated(chosen, PROMPTS, 10, sampling)
    assert together == [generated(chosen, [prompt], 10, sampling)[0] for prompt in PROMPTS]
    assert together != generated(chosen, PROMPTS, 10, Sampling(temperature=1.0, seed=6))


@pytest.mark.parametrize("name", models())
def test_a_row_stops_at_eos_and_the_others_go_on(name: str) -> None:
    chosen = models()[name]
    model = chosen[0]
    output = model.output if isinstance(model, ByteLM) else model.decoder.output
    before = generated(chosen, PROMPTS, 8)
    # The row whose last new id comes latest will end there, once that id's output weights become EOS's.
    fresh = [[at for at, i in enumerate(row) if i not in row[:at]][-1] for row in before]
    row = max(range(len(before)), key=lambda number: fresh[number])
    ending, at = before[row][fresh[row]], fresh[row]
    assert at > 0
    with torch.no_grad():
        output.weight[[EOS, ending]] = output.weight[[ending, EOS]]
    steps = list(generate_ids(*chosen, rows_of(PROMPTS), 8, GREEDY))
    assert [step[row] for step in steps] == [*before[row][:at], EOS, *[None] * (len(steps) - at - 1)]
    for other, ids in enumerate(before):
        until = ids.index(ending) if ending in ids else len(ids)
        assert [step[other] for step in steps[:until]] == ids[:until]


def test_all_rows_have_ended() -> None:
    chosen = models()["byte LM"]
    assert isinstance(chosen[0], ByteLM)
    with torch.no_grad():
        chosen[0].output.weight.zero_()  # EOS is the first of the allowed ids
    assert list(generate_ids(*chosen, rows_of(PROMPTS), 8, GREEDY)) == [[EOS] * 4]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_max_new_bytes(count: int) -> None:
    assert [len(row) for row in generated(models()["entropy"], PROMPTS[:2], count)] == [count, count]


def test_no_prompts() -> None:
    assert list(generate_ids(*models()["entropy"], [], 5, GREEDY)) == []
