"""The answer of `/v1/patches` is what `BLT.patch` finds, and what `blt info` counts."""

import json

import pytest

from bytelatent.blt import BLT
from bytelatent.errors import UserError
from bytelatent.model.flops import flops_per_byte
from bytelatent.patching import PatchSettings
from bytelatent.serving.patches import patches_answer
from tests.model.tiny import tiny_blt
from tests.test_blt import wrap

TEXT = "Byte by byte, é and 🇯🇵.\nA second line.\n"
SETTINGS = [
    PatchSettings(threshold=5.2),
    PatchSettings(threshold=0.01, monotonicity=True),
    PatchSettings(threshold=5.2, threshold_add=0.0, max_patch_length=6),
    PatchSettings(threshold=5.2, reset_at_newline=True),
    PatchSettings(mode="space"),
    PatchSettings(mode="static", patch_size=3, max_patch_length=2),
]


@pytest.fixture(scope="module")
def blt() -> BLT:
    return wrap(tiny_blt(window=6))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.in_words())
@pytest.mark.parametrize("text", [TEXT, "", "a"])
def test_patches_are_those_of_the_model(blt: BLT, settings: PatchSettings, text: str) -> None:
    blt.patching = settings
    answer = json.loads(json.dumps(patches_answer(blt, text)))
    patches = blt.patch(text)
    wanted = [{"start": patch.start, "end": patch.end, "text": patch.text} for patch in patches]
    assert answer["patches"] == wanted
    assert answer["starts"] == [patch.start for patch in patches]
    assert answer["bytes"] == len(text.encode())
    entropies = [value for patch in patches for value in patch.entropies or []]
    if settings.needs_entropies:
        assert answer["entropies"] == pytest.approx(entropies, rel=1e-6)
    else:
        assert answer["entropies"] is None
    assert answer["modes"][answer["mode"]]["starts"] == answer["starts"]


def test_other_modes_are_those_of_other_settings(blt: BLT) -> None:
    blt.patching = SETTINGS[0]
    modes = patches_answer(blt, TEXT, ["space", "static:5", "byte"])["modes"]
    others = {
        "space": PatchSettings(mode="space"),
        "static:5": PatchSettings(mode="static", patch_size=5),
        "byte": PatchSettings(mode="byte"),
    }
    for name, settings in others.items():
        blt.patching = settings
        assert modes[name]["starts"] == [patch.start for patch in blt.patch(TEXT)], name
    assert modes["byte"]["flops_saved"] == 0


def test_flops_saved_are_those_of_the_counter(blt: BLT) -> None:
    blt.patching = SETTINGS[0]
    answer = patches_answer(blt, TEXT)
    assert blt.entropy_model is not None
    counted = flops_per_byte(blt.model.settings, answer["bytes"] / len(answer["starts"]), blt.context)
    counted += flops_per_byte(blt.entropy_model.settings, 1.0, blt.context)
    wanted = 1 - counted / flops_per_byte(blt.model.settings, 1.0, blt.context)
    assert answer["flops_saved"] == pytest.approx(wanted, abs=1e-3)


def test_a_threshold_in_place_of_the_models(blt: BLT) -> None:
    blt.patching = SETTINGS[0]
    answer = patches_answer(blt, TEXT, threshold=4.0, with_patches=False)
    assert "patches" not in answer
    blt.patching = PatchSettings(threshold=4.0)
    assert answer["starts"] == [patch.start for patch in blt.patch(TEXT)]
    blt.patching = PatchSettings(mode="space")
    with pytest.raises(UserError, match="leave it out"):
        patches_answer(blt, TEXT, threshold=4.0)


@pytest.mark.parametrize(
    "name", ["bpe:/etc/passwd", "bpe", "entropy:1", "static", "static:0", "static:x", "space:1", "no"]
)
def test_no_other_mode(blt: BLT, name: str) -> None:
    blt.patching = SETTINGS[0]
    with pytest.raises(UserError, match=r"modes|static"):
        patches_answer(blt, TEXT, [name])
