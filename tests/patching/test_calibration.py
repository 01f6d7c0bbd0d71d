"""The chosen threshold against a search through all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings, calibrate, mean_patch_bytes, patch_bytes_by_threshold
from bytelatent.vocab import encode
from tests.patching import slow
from tests.patching.streams import Document, documents, packed, synthetic_stream

PATCHINGS = {
    "plain": {},
    "monotonic": {"monotonicity": True},
    "combined": {"threshold_add": 0.5},
    "plain max": {"max_patch_length": 4},
    "monotonic max": {"monotonicity": True, "max_patch_length": 6},
    "combined max": {"threshold_add": 0.25, "max_patch_length": 3},
}


@pytest.fixture(scope="session", params=PATCHINGS)
def entropy_patching(request: pytest.FixtureRequest) -> PatchSettings:
    return PatchSettings.parse({"threshold": 0.0, **PATCHINGS[request.param]})


def all_sizes(stream: tuple[Tensor, Tensor, Tensor], patching: PatchSettings) -> list[float]:
    """The mean patch size under every threshold, lowest first: entropies and their rises are 32nds of a nat.

    Between two of them that follow one another, every threshold decides the same.
    """
    ids, entropies, position = stream
    low = -200 if patching.monotonicity else -1
    deciding = torch.cat([entropies, entropies.diff()]).unique()
    thresholds = (torch.arange(low, 200) + 0.5) / 32
    between = torch.bucketize(thresholds, deciding).tolist()
    return [
        mean_patch_bytes(ids, entropies, position, patching.model_copy(update={"threshold": threshold}))
        for number, threshold in enumerate(thresholds.tolist())
        if number == 0 or between[number] != between[number - 1]
    ]


@given(seed=st.integers(0, 2**32 - 1), num_documents=st.integers(1, 4), share=st.floats(0.0, 1.0))
def test_the_size_is_the_nearest_that_a_threshold_gives(
    entropy_patching: PatchSettings, seed: int, num_documents: int, share: float
) -> None:
    stream = synthetic_stream(seed, num_documents)
    sizes = all_sizes(stream, entropy_patching)
    wanted = min(sizes) + share * (max(sizes) - min(sizes))
    found = calibrate(*stream, wanted, entropy_patching)
    assert abs(found.mean_patch_bytes - wanted) <= min(abs(size - wanted) for size in sizes)
    chosen = entropy_patching.model_copy(update={"threshold": found.threshold})
    assert mean_patch_bytes(*stream, chosen) == found.mean_patch_bytes
    assert found.wanted_patch_bytes == wanted
    assert found.data_bytes == int((stream[0] >= 4).sum())


@given(seed=st.integers(0, 2**32 - 1))
def test_a_size_out_of_reach_names_what_is_in_reach(entropy_patching: PatchSettings, seed: int) -> None:
    stream = synthetic_stream(seed, 3)
    sizes = all_sizes(stream, entropy_patching)
    for wanted in (min(sizes) * 0.9, max(sizes) * 1.1):
        with pytest.raises(UserError) as caught:
            calibrate(*stream, wanted, entropy_patching)
        assert str(caught.value).endswith(f"these settings give {min(sizes):.2f} to {max(sizes):.2f}")


@given(st.lists(documents, min_size=1, max_size=4))
def test_mean_patch_bytes_counts_patches_with_bytes(patching: PatchSettings, stream: list[Document]) -> None:
    num_bytes, num_patches = 0, 0
    for ids, entropies in stream:
        patches: list[list[int]] = []
        for id_, start in zip(ids, slow.starts(ids, entropies, patching), strict=False):
            if start:
                patches.append([])
            patches[-1].append(id_)
        num_bytes += sum(id_ >= 4 for id_ in ids)
        num_patches += sum(max(patch) >= 4 for patch in patches)
    assert mean_patch_bytes(*packed(stream), patching) == (num_bytes / num_patches if num_patches else 0.0)


@pytest.mark.parametrize("monotonicity", [False, True])
def test_one_byte_can_be_calibrated_and_none_cannot(monotonicity: bool) -> None:
    patching = PatchSettings(threshold=0.0, monotonicity=monotonicity)
    one = torch.from_numpy(encode(b"x", bos=False, eos=False))
    assert calibrate(one, torch.tensor([1.0]), torch.tensor([0]), 1.0, patching).mean_patch_bytes == 1.0
    nothing = torch.from_numpy(encode(b""))
    with pytest.raises(UserError, match="no bytes"):
        calibrate(nothing, torch.ones(2), torch.arange(2), 1.0, patching)


def test_calibration_without_a_mode_is_for_the_plain_one() -> None:
    stream = synthetic_stream(0, 20)
    plain = PatchSettings(threshold=0.0)
    assert calibrate(*stream, 4.0) == calibrate(*stream, 4.0, plain)
    assert calibrate(*stream, 4.0).mean_patch_bytes == pytest.approx(4.0, rel=0.05)


def test_the_curve_goes_through_what_each_threshold_gives() -> None:
    stream = synthetic_stream(3, 4)
    patching = PatchSettings(mode="entropy", threshold=0.0)
    thresholds, sizes = patch_bytes_by_threshold(*stream, patching, num_points=9)
    assert thresholds == sorted(set(thresholds))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    for threshold, size in zip(thresholds, sizes, strict=True):
        assert mean_patch_bytes(*stream, patching.model_copy(update={"threshold": threshold})) == size
