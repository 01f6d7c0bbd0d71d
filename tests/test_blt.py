"""The public face."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bytelatent import BLT
from bytelatent.config import warn_renamed
from bytelatent.errors import UserError
from bytelatent.inference import Decoder, Engine, Sampling, prompt_ids
from bytelatent.inference.quantize import quantize_model
from bytelatent.model import BLTModel
from bytelatent.patching import PatchSettings
from bytelatent.vocab import BOS, OFFSET
from bytelatent.weights import Config
from tests.model import slow
from tests.model.tiny import tiny_blt, tiny_byte_lm

CONTEXT = 24
THRESHOLD = 5.12
HALF = r"prompt: '\\ud800'"
TEXTS = [
    "x",
    "a short text",
    "\u00e9\u4f60\U0001f600 and more",
    "a text longer than what the model sees at once",
]


def wrap(model: BLTModel, patching: PatchSettings | None = None, with_byte_lm: bool = True) -> BLT:
    patching = patching or PatchSettings(mode="entropy", threshold=THRESHOLD)
    config = Config(model=model.settings, context=CONTEXT, patching=patching)
    return BLT(model, config, tiny_byte_lm(window=6) if with_byte_lm else None)


@pytest.fixture
def blt() -> BLT:
    return wrap(tiny_blt(window=6))


def parts(text: str) -> list[list[int]]:
    """The ids of a text and what follows the last: pieces of at most CONTEXT ids to read."""
    ids = [1, *(b + 4 for b in text.encode()), 2]
    return [ids[at : at + CONTEXT + 1] for at in range(0, len(ids) - 1, CONTEXT)]


def slow_entropies(blt: BLT, ids: list[int]) -> np.ndarray:
    assert blt.entropy_model is not None
    logits = slow.byte_lm(blt.entropy_model.settings, blt.entropy_model.state_dict(), ids)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


def slow_starts(blt: BLT, ids: list[int]) -> list[bool]:
    entropies = slow_entropies(blt, ids)
    assert np.abs(entropies - THRESHOLD).min() > 1e-5  # rounding decides nothing here
    return [at == 0 or entropy > THRESHOLD for at, entropy in enumerate(entropies)]


def test_generating_on_a_cpu_imports_no_compiler(tmp_path: Path) -> None:
    """It takes seconds to import, and `blt generate` would wait for it."""
    wrap(tiny_blt()).save_pretrained(tmp_path / "model")
    code = (
        "import sys; from bytelatent import BLT; model = BLT.from_pretrained(sys.argv[1]); "
        "model.generate('hello', max_new_bytes=3); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")]).returncode == 0


@pytest.mark.parametrize("text", TEXTS)
def test_patches_cover_the_text_once(blt: BLT, text: str) -> None:
    data = text.encode()
    patches = blt.patch(text)
    assert [i for patch in patches for i in range(patch.start, patch.end)] == list(range(len(data)))
    assert all(patch.start < patch.end for patch in patches)
    assert [patch.text for patch in patches] == [data[p.start : p.end].decode(errors="replace") for p in patches]
    assert blt.patch(data) == patches


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("context", [None, CONTEXT])
def test_a_bytes_entropy_is_that_of_the_position_before(blt: BLT, context: int | None, text: str) -> None:
    pieces = [prompt_ids(text).tolist()] if context is None else [ids[:-1] for ids in parts(text)]
    size = len(text.encode())
    expected = np.concatenate([slow_entropies(blt, ids) for ids in pieces])[:size]
    starts = [start for ids in pieces for start in [*slow_starts(blt, ids)[:-1], True]][
        :size
    ]  # a piece begins with one
    patches = blt.patch(text, context)
    found = [entropy for patch in patches for entropy in patch.entropies or ()]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [patch.start for patch in patches] == [0, *(at for at, start in enumerate(starts) if start and at > 0)]


def test_patch_without_a_byte_lm() -> None:
    ours = wrap(tiny_blt(), PatchSettings(mode="space"), with_byte_lm=False)
    assert [patch.text for patch in ours.patch("It is so.")] == ["It ", "is ", "so."]
    assert all(patch.entropies is None for patch in ours.patch("It is so."))
    assert ours.patch("") == []


@pytest.mark.parametrize("stop_at_document", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_bits_per_byte(text: str, stop_at_document: bool) -> None:
    """Every byte and the end, piece by piece, paid for by the bytes."""
    ours = wrap(tiny_blt(window=6, stop_at_document=stop_at_document))
    nats = 0.0
    for ids in parts(text):
        logits = slow.blt(ours.model.settings, ours.model.state_dict(), ids[:-1], slow_starts(ours, ids[:-1]))
        shifted = logits - logits.max(-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        nats -= sum(log_p[at, target] for at, target in enumerate(ids[1:]))
    assert ours.bits_per_byte(text) == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_nothing_to_measure(blt: BLT) -> None:
    for empty in ("", b""):
        with pytest.raises(UserError, match="the text is empty"):
            blt.bits_per_byte(empty)


@pytest.mark.parametrize("stop_at_document", [True, False])
def test_rows_of_logits_are_independent(stop_at_document: bool) -> None:
    ours = wrap(tiny_blt(window=6, stop_at_document=stop_at_document))
    rows = [[1, 70, 80, 90, 75, 82], [1, 99], [1, 70, 80, 90, 75, 82], [1, 200, 201, 202]]
    ids = torch.tensor([row + [-1] * (6 - len(row)) for row in rows])
    together = ours.logits(ids)
    assert together.shape == (4, 6, 260)
    assert (together[ids == -1] == 0).all()
    torch.testing.assert_close(together[0], together[2], atol=2e-5, rtol=0)
    for row, logits in zip(rows, together, strict=True):
        expected = slow.blt(ours.model.settings, ours.model.state_dict(), row, slow_starts(ours, row))
        np.testing.assert_allclose(logits[: len(row)].numpy(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("last", [0, 1])
def test_logits_of_given_patches(blt: BLT, last: int) -> None:
    """Lengths may or may not include whether the next id starts a patch."""
    ids, lengths = torch.tensor([[1, 70, 80, 90, 75]]), torch.tensor([[1, 3, 0, 1, last, 0]])
    found = blt.logits(ids, lengths)[0].numpy()
    expected = slow.blt(
        blt.model.settings, blt.model.state_dict(), ids[0].tolist(), [True, False, False, True, bool(last)]
    )
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_a_last_patch_that_goes_on(blt: BLT) -> None:
    """In [1, 3, 2], the next id belongs to the last patch, like in [1, 3, 1]."""
    ids = torch.tensor([[1, 70, 80, 90, 75]])
    assert blt.logits(ids, torch.tensor([[1, 3, 2]])).equal(blt.logits(ids, torch.tensor([[1, 3, 1]])))
    assert not blt.logits(ids, torch.tensor([[1, 3, 2]])).equal(blt.logits(ids, torch.tensor([[1, 3, 1, 1]])))


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (torch.tensor([1, 70]), None, r"logits takes ids \[B, N\]"),
        (torch.tensor([[1, 70]]), torch.tensor([[1, 1], [1, 1]]), "logits takes ids"),
        (torch.tensor([[1, 70]]), torch.tensor([[1]]), "patch_lengths sum to 1; a row of 2 ids needs 2 or 3"),
        (torch.tensor([[1, 70]]), torch.tensor([[1, 3]]), "patch_lengths sum to 4"),
        (torch.tensor([[1, 70]]), torch.tensor([[3, -1]]), "patch_lengths are 0 or more, not -1"),
        (torch.tensor([[1, 260]]), None, r"^logits: ids are whole numbers from 0 to 259, and -1 for padding$"),
        (torch.tensor([[1, -2]]), None, "logits: ids are whole numbers"),
        (torch.tensor([[1.0, 2.0]]), None, "logits: ids are whole numbers"),
        (torch.tensor([[1, -1, 5]]), None, "logits: padding .-1. belongs at the end of a row"),
    ],
)
def test_logits_that_do_not_fit(blt: BLT, ids: torch.Tensor, lengths: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        blt.logits(ids, lengths)


def test_generate(blt: BLT) -> None:
    """Greedy bytes are the likeliest of the logits, one after another."""
    text = blt.generate("The", max_new_bytes=6, temperature=0)
    ids = torch.tensor([[1, *(b + 4 for b in b"The")]])
    new: list[int] = []
    for _ in range(6):
        last = blt.logits(ids)[0, -1]
        last[[0, 1, 3]] = -torch.inf
        new.append(int(last.argmax()))
        if new[-1] == 2:
            break
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
    assert text == bytes(i - 4 for i in new if i > 3).decode(errors="replace")
    assert blt.generate(["The", "The"], max_new_bytes=6, temperature=0) == [text, text]
    assert blt.generate([], max_new_bytes=6) == []
    with pytest.raises(UserError, match="topp: unknown key; did you mean 'top_p'"):
        blt.generate("x", topp=0.5)


def test_round_trip(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "new" / "a")
    again = BLT.from_pretrained(tmp_path / "new" / "a", device="cpu")
    assert again.config == blt.config
    assert again.context == CONTEXT
    for ours, theirs in ((blt.model, again.model), (blt.entropy_model, again.entropy_model)):
        assert ours is not None
        assert theirs is not None
        state = theirs.state_dict()
        assert all(value.equal(state[name]) for name, value in ours.state_dict().items())
    ids = torch.tensor([[1, 70, 80, 90, 75]])
    assert again.logits(ids).equal(blt.logits(ids))
    assert again.patch(TEXTS[3]) == blt.patch(TEXTS[3])
    again.save_pretrained(tmp_path / "new" / "a")  # over itself
    assert BLT.from_pretrained(tmp_path / "new" / "a", device="cpu").logits(ids).equal(blt.logits(ids))


def test_published_weights_round_trip(goldens: Path, tmp_path: Path) -> None:
    published = BLT.from_pretrained(goldens / "blt_k2", entropy_model=goldens / "entropy", device="cpu")
    published.save_pretrained(tmp_path / "a")
    again = BLT.from_pretrained(tmp_path / "a", device="cpu")
    ids = torch.tensor([[1, *(b + 4 for b in b"the same bits"), 2]])
    assert again.logits(ids).equal(published.logits(ids))
    assert again.patch("the same bits") == published.patch("the same bits")


def test_old_names_still_work(blt: BLT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_renamed.cache_clear()
    blt.save_pretrained(tmp_path / "a")
    old: Any = {"entropy": tmp_path / "a" / "byte_lm", "weights": "int8"}
    model = BLT.from_pretrained(tmp_path / "a", device="cpu", **old)
    assert model.quantize == "int8" == model.weights
    model.byte_lm = tiny_byte_lm(seed=5)
    assert model.entropy_model is model.byte_lm
    old = {"num_rows": 2}
    assert model.engine(**old).is_idle
    for names in (
        "entropy= is now entropy_model=",
        "weights= is now quantize=",
        "BLT.byte_lm is now BLT.entropy_model",
    ):
        assert sum(line.startswith(names) for line in caplog.messages) == 1


def test_precision_of_the_weights(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a")
    half = BLT.from_pretrained(tmp_path / "a", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.entropy_model is not None
    assert {p.dtype for p in half.entropy_model.parameters()} == {torch.float32}
    assert half.patch(TEXTS[3]) == blt.patch(TEXTS[3])
    ids = torch.tensor([[1, 70, 80, 90, 75]])
    logits = half.logits(ids)
    assert logits.dtype == torch.float32
    assert not logits.equal(blt.logits(ids))
    torch.testing.assert_close(logits, blt.logits(ids), atol=0.2, rtol=0.1)
    with pytest.raises(UserError, match="dtype: 'float16' is not known"):
        BLT.from_pretrained(tmp_path / "a", dtype="float16")


def test_streams_of_several_texts_are_those_alone(blt: BLT) -> None:
    assert "".join(blt.stream("The", max_new_bytes=30)) == blt.generate("The", max_new_bytes=30)
    assert blt.generate(["The", "", "a longer one"], max_new_bytes=30)[0] == blt.generate("The", max_new_bytes=30)


def test_quantized_weights(blt: BLT, tmp_path: Path) -> None:
    """One model for all that is done with it; its patches are those of the weights as they are."""
    blt.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="quantize: 'int4' is not one of full, int8, fp8"):
        BLT.from_pretrained(tmp_path / "absent", quantize="int4")  # type: ignore[arg-type]
    ids = torch.tensor([[1, 70, 80, 90, 75]])
    for quantize in ("int8", "fp8"):
        ours = BLT.from_pretrained(tmp_path / "a", device="cpu", quantize=quantize)
        assert ours.quantize == quantize
        assert ours.patch(TEXTS[3]) == blt.patch(TEXTS[3])
        assert ours.logits(ids).equal(wrap(quantize_model(blt.model, quantize)).logits(ids))
        assert not ours.logits(ids).equal(blt.logits(ids))
        expected = float(ours.logits(torch.tensor([[1, 70, 80]]))[0, -2].log_softmax(-1)[80])
        assert ours.score(b"\x42", [b"\x4c"]) == [pytest.approx(expected, abs=1e-4)]
        assert ours.bits_per_byte(TEXTS[1]) == pytest.approx(blt.bits_per_byte(TEXTS[1]), rel=0.02)
        assert ours.generate("x", max_new_bytes=5) == "".join(ours.stream("x", max_new_bytes=5))
        with pytest.raises(UserError, match=f"no format holds weights quantized to {quantize}; load without"):
            ours.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_models_that_are_no_blt_or_lack_something(goldens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a byte LM, which has no patches"):
        BLT.from_pretrained(goldens / "entropy")
    lonely = BLT.from_pretrained(goldens / "blt_k2", device="cpu")
    for use in (
        lambda: lonely.patch("x"),
        lambda: lonely.bits_per_byte("x"),
        lambda: lonely.generate("x"),
        lambda: lonely.logits(torch.tensor([[1, 5]])),
    ):
        with pytest.raises(UserError, match="need its entropy model; name it"):
            use()
    model = tiny_blt()
    wrap(model, PatchSettings(mode="byte"), with_byte_lm=False).save_pretrained(tmp_path / "a")
    config = Config(model=model.settings, context=9)
    (tmp_path / "a" / "config.json").write_text(config.model_dump_json())
    with pytest.raises(UserError, match="has no patching settings"):
        BLT.from_pretrained(tmp_path / "a")


def test_corrupt_folder(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        BLT.from_pretrained(tmp_path / "a")


def test_saving_replaces_a_model_and_nothing_else(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "model")
    blt.save_pretrained(tmp_path / "model")
    assert BLT.from_pretrained(tmp_path / "model").patching == blt.patching
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="something else"):
        blt.save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_stream_and_score(blt: BLT) -> None:
    """Pieces put together are what `generate` gives; scores are those of the logits."""
    settings = {"max_new_bytes": 20, "temperature": 1.0, "seed": 4}
    assert "".join(blt.stream("The", **settings)) == blt.generate("The", **settings)
    scores = blt.score("The", ["abc", "", "\u4f60" * 10])
    for text, score in zip(("abc", "", "\u4f60" * 10), scores, strict=True):
        ids = torch.tensor([[1, *(b + 4 for b in ("The" + text).encode())]])
        log_probabilities = blt.logits(ids)[0].double().log_softmax(-1)
        expected = sum(float(log_probabilities[at - 1, ids[0, at]]) for at in range(4, ids.shape[1]))
        assert score == pytest.approx(expected, abs=1e-4)
    assert len(blt.generate("The", max_new_bytes=5, samples=2)) == 2
    assert blt.generate("The", max_new_bytes=30, temperature=0, stop="\x00never") == blt.generate(
        "The", max_new_bytes=30, temperature=0
    )
    for wrong, message in (
        (lambda: blt.generate("x", samples=0), "samples: 0 is not a number"),
        (lambda: blt.score("x", "os"), "takes a list of continuations"),
        (lambda: blt.stream("x", temprature=1), "temprature: unknown key; did you mean 'temperature'"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()


def test_a_reused_engine_has_the_new_weights(blt: BLT) -> None:
    settings: dict = {"max_new_bytes": 12, "seed": 4}
    before = blt.generate("The", **settings)
    assert blt._idle_engine is not None
    idle = blt._idle_engine[1]
    assert blt.generate("The", **settings) == before
    assert blt._idle_engine is not None
    assert blt._idle_engine[1] is idle
    head = blt.model.decoder.output.weight
    with torch.no_grad():
        head.neg_()
    try:
        after = blt.generate("The", **settings)
        assert after == "".join(BLT(blt.model, blt.config, blt.entropy_model).stream("The", **settings)) != before
    finally:
        with torch.no_grad():
            head.neg_()
    for _ in zip(blt.stream("The", max_new_bytes=50), range(2), strict=False):  # nobody wants the rest
        pass
    assert blt.generate("The", **settings) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda blt: blt.engine(batch_size=0), "batch_size: 0 is not a number"),
        (lambda blt: blt.engine(batch_size="4"), "batch_size: '4' is not a number"),
        (
            lambda blt: Engine.plain(Decoder(blt.model, blt.patching, blt.entropy_model), -1),
            "batch_size: -1 is not a number",
        ),
        (lambda blt: blt.engine(1).submit(["Once"], Sampling(), 3), "a text is str or bytes, not list"),
        (lambda blt: blt.engine(1).submit(torch.ones(1, 3), Sampling(), 3), "prompt: ids .* of one text"),
        (
            lambda blt: blt.generate("x", max_new_bytes=2**64),
            "max_new_bytes: 18446744073709551616 is not a number",
        ),
        (lambda blt: blt.stream("x", max_new_bytes="5"), "max_new_bytes: '5' is not a number"),
        (lambda blt: blt.generate("x", samples=1.5), "^samples: 1.5 is not a number from 1 to 100,000$"),
        (lambda blt: blt.generate("x", samples=10**12), "^samples: 1000000000000 is not a number"),
        (
            lambda blt: blt.generate("x", samples=10**5000),
            "^samples: a number of 16,610 bits is not a number",
        ),
        (
            lambda blt: blt.generate(["x"] * 11, samples=100_000),
            "^samples: 100,000 of each of 11 prompts; .* 1,000,000",
        ),
        (lambda blt: blt.generate("x", samples=-3), "samples: -3 is not a number"),
        (lambda blt: blt.generate("x", seed=2**64), "seed: Input should be less than 18446744073709551616"),
        (lambda blt: blt.generate("x", seed=-(2**63) - 1), "seed: Input should be greater than"),
        (lambda blt: blt.generate("x", temperature=math.nan), "temperature: Input should be"),
        (lambda blt: blt.stream("x", top_p=1.5), "top_p: Input should be less than"),
        (lambda blt: blt.engine(batch_size=10**12), "batch_size: 1000000000000 is not a number from 1 to 65,536"),
        (lambda blt: blt.engine(batch_size=True), "batch_size: True is not a number"),
        (
            lambda blt: blt.engine(1).submit("x", Sampling(), 3, samples=10**12),
            "samples: 1000000000000 is not a number",
        ),
        (lambda blt: blt.engine(1).submit("x", Sampling(), 3, samples=0), "samples: 0 is not a number"),
        (lambda blt: blt.engine(1).submit("x", {"seed": 1}, 3), "sampling: dict is no Sampling"),  # type: ignore
        (lambda blt: blt.engine(1).submit(torch.tensor([1, 260]), Sampling(), 3), "prompt: ids are whole numbers"),
        (lambda blt: blt.engine(1).submit(torch.tensor([1.0]), Sampling(), 3), "prompt: ids are whole numbers"),
        (lambda blt: blt.generate("x", samples="2"), "samples: '2' is not a number"),
        (lambda blt: blt.generate("x", samples=True), "samples: True is not a number"),
        (lambda blt: blt.generate("x", stop="\ud800"), "stop: .* holds half of a surrogate pair"),
        (lambda blt: BLT.from_pretrained("absent", draft_length=8), "draft_length: speculative decoding was"),  # type: ignore
        (lambda blt: BLT.from_pretrained("absent", ahead=8), "ahead: speculative decoding was removed"),  # type: ignore
        (lambda blt: setattr(blt, "draft_length", 4), "draft_length: .* was removed .*; leave it out, the text is"),
        (lambda blt: blt.ahead, "ahead: speculative decoding was removed"),
        (lambda blt: blt.stream(["a", ["b"]]), "a text is str or bytes, not list"),
        (lambda blt: blt.score("a", [5]), "a text is str or bytes, not int: 5"),
        (lambda blt: blt.score("a", 5), "score takes a list of continuations"),
        (lambda blt: blt.generate(5), "a text is str or bytes, not int: 5"),
        (lambda blt: blt.generate(["a", None]), "a text is str or bytes, not NoneType"),
        (lambda blt: blt.logits([1, 5, 6]), "a text is str or bytes, not list"),
        (lambda blt: blt.patch(5), "a text is str or bytes, not int"),
        (lambda blt: blt.generate("a\ud800"), rf"^{HALF} at character 2 is half of a surrogate pair; .* give bytes$"),
        (lambda blt: blt.generate(["a", "\ud800\udc00"]), f"{HALF} at character 1"),
        (lambda blt: blt.stream("\udcff\ud800"), f"{HALF} at character 2"),
        (lambda blt: blt.score("\ud800", ["a"]), HALF),
        (lambda blt: blt.engine(1).submit("\ud800", Sampling(), 3), HALF),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(call: Callable[[BLT], object], message: str, blt: BLT) -> None:
    with pytest.raises(UserError, match=message):
        call(blt)


def test_bytes_that_are_no_text_are_a_prompt(blt: BLT) -> None:
    half = "\ud800".encode("utf-8", "surrogatepass")
    assert torch.equal(prompt_ids(half), torch.tensor([BOS, *(OFFSET + byte for byte in half)]))
    assert torch.equal(prompt_ids(half.decode("utf-8", "surrogateescape")), prompt_ids(half))
    assert blt.generate(half, max_new_bytes=3) == "".join(blt.stream(half, max_new_bytes=3))


def test_text_where_ids_are_taken_too(blt: BLT) -> None:
    ids = prompt_ids("Once")
    assert torch.equal(blt.logits("Once"), blt.logits(ids[None]))
    assert torch.equal(blt.logits(b"Once"), blt.logits(ids[None]))
    engine = blt.engine(batch_size=3)
    asked = [engine.submit(prompt, Sampling(), 8)[0] for prompt in ("Once", b"Once", ids)]
    engine.run()
    assert asked[0].ids == asked[1].ids == asked[2].ids
