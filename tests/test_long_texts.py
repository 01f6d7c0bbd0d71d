"""One text, longer than the model's context, in everything that reads it: whole where it is used, in pieces of the
context where it is measured."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.commands.calibrate import calibrate_text
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_text import evaluate_models
from bytelatent.commands.options import CalibrateSettings
from bytelatent.data import patches_of
from bytelatent.errors import UserError
from bytelatent.inference import Sampling, prompt_ids, scoring
from bytelatent.model import pack_rows
from bytelatent.patching import Patch, PatchSettings, next_starts
from bytelatent.vocab import EOS, encode
from bytelatent.weights import Config
from tests.model.tiny import tiny_blt, tiny_byte_lm

CONTEXT = 50
TEXT = "The history of a text that is far longer than what its model has seen at once. " * 3
PATCHINGS = {
    "entropy": PatchSettings(threshold=5.12),
    "rises": PatchSettings(threshold=0.03, monotonicity=True),
    "static": PatchSettings(mode="static", patch_size=7),
    "split": PatchSettings(threshold=5.2, max_patch_length=6),
}


def wrap(patching: PatchSettings, window: int | None) -> BLT:
    model = tiny_blt(window=8, stop_at_document=False)
    return BLT(model, Config(model=model.settings, context=CONTEXT, patching=patching), tiny_byte_lm(window=window))


@pytest.fixture(params=PATCHINGS)
def blt(request: pytest.FixtureRequest) -> BLT:
    return wrap(PATCHINGS[request.param], window=None)


def used_by(blt: BLT, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[int]:
    """The bytes at which patches of TEXT begin, as the network is given them."""
    found: list[Any] = []

    def forward(batch: Any, run: Callable[[Any], Tensor] = blt.model.forward) -> Tensor:
        found.append(batch)
        return run(batch)

    with monkeypatch.context() as patched:
        patched.setattr(blt.model, "forward", forward)
        call()
    patches = torch.cat([batch.patch + 1000 * number for number, batch in enumerate(found)])
    starts = (patches[2:] != patches[1:-1]).nonzero()[:, 0] + 1
    return [0, *starts.tolist()]


def borders(patches: list[Patch]) -> list[int]:
    return [patch.start for patch in patches]


def bits(logits: Tensor) -> float:
    """Bits per byte of TEXT and its end by the logits [N, V] of what was read of it."""
    targets = torch.from_numpy(encode(TEXT, bos=False))
    return float(-logits.double().log_softmax(-1).gather(1, targets[:, None]).sum()) / math.log(2) / len(TEXT)


def test_a_text_is_used_whole(blt: BLT, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = blt.patch(TEXT)
    assert borders(patches) == used_by(blt, monkeypatch, lambda: blt.logits(TEXT))
    logits = blt.logits(TEXT)[0]
    log_probabilities = logits.double().log_softmax(-1)
    ids = prompt_ids(TEXT)
    expected = float(log_probabilities[:-1].gather(1, ids[1:, None]).sum())
    assert blt.score("", [TEXT]) == [pytest.approx(expected, abs=1e-3)]
    half = len(TEXT) // 2
    expected = float(log_probabilities[half:-1].gather(1, ids[half + 1 :, None]).sum())
    assert blt.score(TEXT[:half], [TEXT[half:]]) == [pytest.approx(expected, abs=1e-3)]
    # Bytes after the prompt and beyond the context are the likeliest of these logits, too.
    engine = blt.engine(1)
    [one] = engine.submit(TEXT[:30], Sampling(temperature=0), 60)
    engine.run()
    whole = torch.cat([one.prompt, torch.tensor(one.ids)])
    after = blt.logits(whole[None])[0, len(one.prompt) - 1 : -1].log_softmax(-1)
    after[:, [0, 1, 3]] = -torch.inf
    assert len(whole) > CONTEXT
    assert (after.amax(1) - after.gather(1, torch.tensor(one.ids)[:, None])[:, 0]).max() < 1e-4
    assert blt.bits_per_byte(TEXT, context=len(TEXT) + 1) == pytest.approx(bits(logits), rel=1e-5)


def test_a_text_is_measured_in_pieces(blt: BLT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As training reads it, by which bits per byte of a run and of the model can be compared."""
    patches = blt.patch(TEXT, context=CONTEXT)
    assert borders(patches) == used_by(blt, monkeypatch, lambda: blt.logits(TEXT, context=CONTEXT))
    assert borders(patches) == used_by(blt, monkeypatch, lambda: blt.bits_per_byte(TEXT))
    assert borders(patches) != borders(blt.patch(TEXT))
    expected = bits(blt.logits(TEXT, context=CONTEXT)[0])
    assert blt.bits_per_byte(TEXT) == pytest.approx(expected, rel=1e-5)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}))
    blt.save_pretrained(tmp_path / "model")
    settings = EvaluateSettings(model=str(tmp_path / "model"), text=[str(tmp_path / "text.jsonl")], device="cpu")
    found = evaluate_models(settings)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert found["mean_patch_bytes"] == pytest.approx(len(TEXT) / len(patches))


def test_stored_entropies_are_those_of_pieces(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    blt = wrap(PATCHINGS["entropy"], window=9)
    blt.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}))
    arguments = ["entropies", str(tmp_path / "text.jsonl"), "-m", str(tmp_path / "model"), "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "float32"], catch_exceptions=False)
    assert result.exit_code == 0
    [file] = (tmp_path / "o").rglob("*.parquet")
    stored = torch.tensor(pq.read_table(file)["entropies"][0].as_py())[: len(TEXT)]
    shown = torch.tensor([h for patch in blt.patch(TEXT, context=CONTEXT) for h in patch.entropies or ()])
    torch.testing.assert_close(stored, shown, atol=4e-3, rtol=0)  # they are stored in float16
    whole = torch.tensor([h for patch in blt.patch(TEXT) for h in patch.entropies or ()])
    assert (whole - shown).abs().max() > 0.02


@pytest.mark.parametrize("window", [None, 9])
def test_entropies_of_a_long_text_are_those_of_one_pass(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "AT_ONCE", 40)
    monkeypatch.setattr(scoring, "PIECE", 17)
    byte_lm = tiny_byte_lm(window=window)
    stream = pack_rows([prompt_ids(TEXT)])
    found = scoring.entropies_of(byte_lm, stream)
    torch.testing.assert_close(found, byte_lm.entropies(stream), atol=1e-5, rtol=0)
    model = tiny_blt()
    blt = BLT(model, Config(model=model.settings, context=CONTEXT, patching=PATCHINGS["entropy"]), byte_lm)
    starts = next_starts(stream.ids, found, stream.position, PATCHINGS["entropy"])[1 : len(TEXT)]
    assert borders(blt.patch(TEXT)) == [0, *(starts.nonzero()[:, 0] + 1).tolist()]


def test_a_text_of_every_length_has_one_mode() -> None:
    """Up to the context there is no difference, and a text is patched as its beginning is."""
    blt = wrap(PATCHINGS["entropy"], window=None)
    for size in (0, 1, CONTEXT - 2, CONTEXT - 1, 2 * CONTEXT):
        whole, pieces = blt.patch(TEXT[:size]), blt.patch(TEXT[:size], context=CONTEXT)
        assert (whole == pieces) == (size < CONTEXT)  # BOS is read, too
        assert borders(blt.patch(TEXT))[: len(whole)] == borders(whole)


def test_pieces_of_rows_with_padding_and_given_patches() -> None:
    blt = wrap(PATCHINGS["static"], window=None)
    rows = torch.full((2, 9), -1)
    rows[0], rows[1, :4] = torch.arange(60, 69), torch.arange(70, 74)
    found = blt.logits(rows, context=5)
    torch.testing.assert_close(found[0, :5], blt.logits(rows[:1, :5])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, 5:], blt.logits(rows[:1, 5:])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1, :4], blt.logits(rows[1:, :4])[0], atol=1e-5, rtol=0)
    assert not found[1, 4:].any()
    lengths = torch.tensor([[5, 5], [4, 1]])
    torch.testing.assert_close(blt.logits(rows, lengths, context=5)[1], blt.logits(rows[1:], lengths[1:])[0])


@pytest.mark.parametrize("context", [0, -1, 2.5, "9", True, 2**40])
def test_a_context_that_is_none(context: Any) -> None:
    blt = wrap(PATCHINGS["static"], window=None)
    for call in (blt.patch, blt.bits_per_byte, lambda text, context: blt.logits(text, context=context)):
        with pytest.raises(UserError, match=f"^context: {context!r} is not a number from 1 to "):
            call(TEXT, context=context)


def test_nothing_to_read() -> None:
    blt = wrap(PATCHINGS["entropy"], window=None)
    assert blt.logits(torch.zeros(0, 4, dtype=torch.long)).shape == (0, 4, 260)
    assert blt.logits(torch.full((2, 3), -1)).eq(0).all()
    assert blt.patch("") == patches_of(b"", blt.patcher) == []
    assert EOS == 2


def test_calibrate_reads_pieces_of_the_byte_lms_context(tmp_path: Path) -> None:
    blt = wrap(PATCHINGS["entropy"], window=None)
    blt.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}))
    found, _ = calibrate_text(
        CalibrateSettings(text=[str(tmp_path / "text.jsonl")], model=str(tmp_path / "model"), device="cpu")
    )
    blt.patching = PatchSettings(threshold=found.threshold)
    assert found.mean_patch_bytes == pytest.approx(len(TEXT) / len(blt.patch(TEXT, context=CONTEXT)), rel=0.02)
    assert found.mean_patch_bytes != pytest.approx(len(TEXT) / len(blt.patch(TEXT)), rel=0.02)
