"""Do two runs have the same bits?

    blt train config=CONFIG determinism=true run=runs/one
    blt train config=CONFIG determinism=true run=runs/other
    python dev/same_bits.py runs/one runs/other

Compares what the metrics of each step say but for the clock, and of the newest checkpoint the weights and the
optimizer's state, bit for bit. Prints a line for each difference; exit code 1: there are some.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from bytelatent.run_folder import NoCheckpoint, newest_checkpoint, read_metrics

COMPARED = (
    "step",
    "bytes_seen",
    "bits_per_byte",
    "validation_bits_per_byte",
    "gradient_norm",
    "lr",
    "mean_patch_bytes",
)


def differences(run: Path, other: Path) -> list[str]:
    """A line for each way in which two runs' folders differ."""
    rows, others = (metrics(folder) for folder in (run, other))
    found = [f"{a} is {b} in {other}" for a, b in zip(rows, others, strict=False) if a != b]
    if len(rows) != len(others) or not rows:
        found.append(f"{len(rows)} rows of metrics in {run}, {len(others)} in {other}")
    try:
        newest, newest_other = newest_checkpoint(run)[0], newest_checkpoint(other)[0]
    except NoCheckpoint as error:
        return [*found, str(error)]
    if newest.name != newest_other.name:
        return [*found, f"the newest checkpoints are {newest} and {newest_other}"]
    if (newest / "model.safetensors").read_bytes() != (newest_other / "model.safetensors").read_bytes():
        found.append("the weights differ")
    state, state_of_other = stored_state(newest), stored_state(newest_other)
    if state.keys() != state_of_other.keys():
        found.append("the states hold different tensors")
    both = state.keys() & state_of_other.keys()
    return found + [f"{name} differs" for name in sorted(both) if not torch.equal(state[name], state_of_other[name])]


def stored_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's state, put together from what the ranks wrote."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "state.pt"
        dcp_to_torch_save(checkpoint / "state", whole)
        return torch.load(whole, weights_only=True)


def metrics(run: Path) -> list[dict[str, float]]:
    """What does not depend on the clock; JSON holds each float to its last bit."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: row[key] for key in COMPARED if key in row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    given = parser.parse_args()
    found = differences(given.run, given.other)
    for line in found:
        print(line)
    if found:
        sys.exit(1)
    last = metrics(given.run)[-1]
    print(f"metrics to step {last['step']}, weights and optimizer state are the same, bit for bit")


if __name__ == "__main__":
    main()
