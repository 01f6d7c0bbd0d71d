"""How training scales over GPUs: computed, measured, and whether many GPUs train as one does.

    python benchmarks/scale.py predict [--rate 171440] [--bytes 65536]
    torchrun --nproc-per-node N benchmarks/scale.py measure [MODEL[/ROWS]:WORD+WORD[@BYTES]...] [--bytes 65536 16384]
    torchrun --nproc-per-node 2 benchmarks/scale.py calls [tiny:WORD+WORD...]
    python benchmarks/scale.py tables [--text FILE] [--bytes 65536]
    python benchmarks/scale.py correct [--gpus N] [--text TEXT.jsonl] [--out FOLDER]

predict  the formulas of docs/internals/scaling.md. `--rate` is what one card does of the 1B shape alone, forward and
         backward, in bytes per second (`python benchmarks/train.py 1b`); the 8B shape is taken to reach the
         same share of the matrix rate.
measure  the trainer's steps on random text, so many bytes a GPU; each configuration is a model, a plan (alone, shard,
         hybrid, replicate, tensor) and how it is trained (dense: hash tables like other weights; rows: their gradients
         by rows; float8; selective or full: what is computed again; muon), with other rows of each hash table or bytes
         a GPU where it says so: blt-1b/100003:shard+selective@32768, blt-1b/2000003:shard+rows. `--save FOLDER`: after
         all of them each is made again and saved in the background while steps go on; of one process only what is
         `alone`.
calls    the operations that the host starts in a step, counted on a CPU, without compilation.
tables   what a GPU sends for hash tables in a step of the 1B shape, counted; how many rows a text looks up.
correct  runs of the trainer: many GPUs against one, a second time, from another number, after a rank was killed.

`measure` and `correct` run on a CPU with `--tiny`; `predict` and `tables` only compute, on any machine.
"""

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from bytelatent.errors import guarded
from bytelatent.model import BLTSettings, ModelSettings, build_model, preset
from bytelatent.model.flops import costs, flops_per_byte
from bytelatent.training.distributed.parallelize import fsdp_groups

PATCH_BYTES, DOCUMENT = 4.5, 8192


@dataclass(frozen=True)
class Links:
    """Bytes a second that collectives move, as NCCL counts bus bandwidth."""

    in_host: float = 360e9  # 8 H100 over NVLink: an all-reduce of 1 GiB
    between_hosts: float = 320e9  # 8 cards of 400 Gb/s a host, at 80 %
    gpus_a_host: int = 8
    seconds_a_call: float = 30e-6  # before the first byte moves
    taken: float = 16 / 132  # of a GPU's multiprocessors, while a collective runs

    def of(self, gpus: int) -> float:
        return self.in_host if gpus <= self.gpus_a_host else min(self.in_host, self.between_hosts)


@dataclass(frozen=True)
class Prediction:
    """One step, in seconds."""

    compute: float
    gather: float  # weights, for the forward and again for the backward pass
    reduce: float  # gradients
    tables: float  # rows of the hash tables and their gradients
    exposed: float  # what no computation hides

    @property
    def step(self) -> float:
        return self.compute + self.exposed


def predict(settings: ModelSettings, gpus: int, size: int, seconds_a_byte: float, links: Links) -> Prediction:
    """A step of FSDP on `size` bytes a GPU, hash tables sharded by row."""
    assert isinstance(settings, BLTSettings)
    assert settings.ngram_hash is not None
    parts = costs(settings, PATCH_BYTES, DOCUMENT)
    weights = sum(part.num_parameters for part in parts if part.name != "n-gram hash tables")
    with torch.device("meta"):
        groups = fsdp_groups(build_model(settings))
    first = sum(weight.numel() for part in groups[0] for weight in part.parameters())
    compute = size * seconds_a_byte
    if gpus == 1:
        return Prediction(compute, 0.0, 0.0, 0.0, 0.0)
    speed, share = links.of(gpus), (gpus - 1) / gpus
    call = links.seconds_a_call * math.log2(gpus)
    latency = call * len(groups)
    gather = 2 * (2 * weights * share / speed + latency)
    reduce = 4 * weights * share / speed + latency
    # There and back, in float32: each row that a byte looks up, or their sum among all ranks (`sharded_tables.py`).
    numbers = settings.encoder.dim * min(settings.ngram_hash.num_tables * share, gpus - 1)
    tables = 2 * 4 * size * numbers / speed
    hidden = min(gather + reduce, compute)
    slower = links.taken * hidden
    # The encoder's first gathering and its reduction, the last one, have nothing to hide behind.
    ends = (2 + 4) * first * share / speed + 2 * call
    return Prediction(compute, gather, reduce, tables, (gather + reduce - hidden) + slower + ends + tables)


def print_predictions(rate: float, size: int) -> None:
    flops = {name: flops_per_byte(preset(name), PATCH_BYTES, DOCUMENT) for name in NAMES}
    print("shape, GPUs | bytes/s a GPU | of one GPU's | step | computing | gathering | reducing | tables | exposed, ms")
    for name in NAMES:
        seconds_a_byte = flops[name] / flops["blt-1b"] / rate
        for gpus in (1, 8, 64, 512):
            one = predict(preset(name), gpus, size, seconds_a_byte, Links())
            times = (one.step, one.compute, one.gather, one.reduce, one.tables, one.exposed)
            speed = size / one.step
            print(
                f"{name}, {gpus} | {speed:,.0f} | {speed * seconds_a_byte:.1%} | "
                + " | ".join(f"{seconds * 1e3:.1f}" for seconds in times)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    given = what.add_parser("predict")
    given.add_argument("--rate", type=float, default=171_440, help="bytes a second of the 1B shape on one card")
    given.add_argument("--bytes", type=int, default=65_536, help="a GPU and step")
    given = what.add_parser("measure")
    given.add_argument("configurations", nargs="*", help=f"default: {' '.join(MANY)}; of one GPU {' '.join(ONE)}")
    given.add_argument("--bytes", type=int, nargs="+", default=None, help="a GPU and step; 65,536")
    given.add_argument("--steps", type=int, default=5, help="that the clock sees")
    given.add_argument("--save", type=Path, metavar="FOLDER", help="save there, too; what was saved is removed")
    given.add_argument("--profile", action="store_true", help="print the kernels of a step, too")
    given.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    given.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    given = what.add_parser("calls")
    given.add_argument("configurations", nargs="*", help=f"default: {' '.join(COUNTED)}")
    given.add_argument("--bytes", type=int, default=512, help="a rank and step")
    given = what.add_parser("tables")
    given.add_argument("--text", type=Path, metavar="FILE", help="plain text; else random bytes")
    given.add_argument("--bytes", type=int, default=65_536, help="a GPU and step")
    given = what.add_parser("correct")
    given.add_argument("--gpus", type=int, help="default: all; with --tiny 2")
    given.add_argument("--plans", nargs="+", default=["shard"], choices=["shard", "replicate", "tensor", "rows"])
    given.add_argument("--text", type=Path, help="JSONL; else random words")
    given.add_argument("--out", type=Path, default=Path("runs/scale"), help="for the runs; must not exist")
    given.add_argument("--steps", type=int, default=100)
    given.add_argument("--minutes", type=float, default=10.0, help="after which a run is given up")
    given.add_argument("--determinism", action=argparse.BooleanOptionalAction, default=True, help="of all runs")
    given.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    given = parser.parse_args()
    if given.what == "predict":
        print_predictions(given.rate, given.bytes)
    elif given.what == "tables":
        from scale_tables import print_sent

        guarded(lambda: print_sent(preset("blt-1b"), given.bytes, given.text))
    elif given.what == "calls":
        from scale_calls import count_calls

        guarded(lambda: count_calls(given.configurations or COUNTED, given.bytes))
    elif given.what == "measure":
        from scale_measure import measure

        texts = given.configurations or (ONE if os.environ.get("WORLD_SIZE", "1") == "1" else MANY)
        device = "cuda"
        if given.tiny:
            device, texts = "cpu", [f"tiny:{text.partition('@')[0].partition(':')[2]}" for text in texts]
        sizes = given.bytes or [512 if given.tiny else 65_536]
        guarded(lambda: measure(texts, sizes, given.steps, device, given.compile, given.save, given.profile))
    else:
        from scale_correct import correct

        how = (given.steps, given.minutes, given.tiny, given.determinism)
        guarded(lambda: correct(given.gpus, given.plans, given.text, given.out, *how))


COUNTED = ["tiny:shard", "tiny:shard+keep", "tiny:replicate", "tiny:shard+rows"]
NAMES = ("blt-1b", "blt-8b")
ONE = ["blt-1b:alone", "blt-1b:shard+dense", "blt-1b:shard"]
MANY = [
    *("blt-1b:shard", "blt-1b:hybrid", "blt-1b:replicate", "blt-1b:tensor", "blt-1b:shard+dense"),
    *("blt-1b:shard+float8", "blt-8b:shard+full", "blt-8b:shard+full+float8"),
]

if __name__ == "__main__":
    main()
