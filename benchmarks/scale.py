"""How training scales over GPUs: computed from one card's measured speed and the speeds of links.

    python benchmarks/scale.py predict [--rate 146000] [--bytes 65536]

The formulas stand in docs/scaling.md. `--rate` is what one card does of the 1B shape alone, forward and backward, in
bytes a second (`python benchmarks/train.py 1b`); the 8B shape is taken to reach the same share of the matrix rate.
"""

import argparse
import math
from dataclasses import dataclass

from bytelatent.model import BLTSettings, ModelSettings
from bytelatent.model.flops import costs, flops_per_byte
from bytelatent.model.presets import preset

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
    layers = settings.encoder.num_layers + settings.global_transformer.num_layers + settings.decoder.num_layers
    rows = settings.ngram_hash.num_tables * settings.encoder.dim  # numbers of the tables that a byte looks up
    compute = size * seconds_a_byte
    if gpus == 1:
        return Prediction(compute, 0.0, 0.0, 0.0, 0.0)
    speed, share = links.of(gpus), (gpus - 1) / gpus
    latency = links.seconds_a_call * math.log2(gpus) * layers
    gather = 2 * (2 * weights * share / speed + latency)
    reduce = 4 * weights * share / speed + latency
    tables = 2 * 2 * size * rows * share / speed  # there and back, bfloat16, by all-to-all
    hidden = min(gather + reduce, compute)
    slower = links.taken * hidden
    ends = (gather + reduce) / layers  # the first gather and the last reduction have nothing to hide behind
    return Prediction(compute, gather, reduce, tables, (gather + reduce - hidden) + slower + ends + tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["predict"])
    parser.add_argument("--rate", type=float, default=146_000, help="bytes a second of the 1B shape on one card")
    parser.add_argument("--bytes", type=int, default=65_536, help="a GPU and step")
    given = parser.parse_args()
    flops = {name: flops_per_byte(preset(name), PATCH_BYTES, DOCUMENT) for name in NAMES}
    print("shape, GPUs | bytes/s a GPU | of one GPU's | step | computing | gathering | reducing | tables | exposed, ms")
    for name in NAMES:
        seconds_a_byte = flops[name] / flops["blt-1b"] / given.rate
        for gpus in (1, 8, 64, 512):
            one = predict(preset(name), gpus, given.bytes, seconds_a_byte, Links())
            times = (one.step, one.compute, one.gather, one.reduce, one.tables, one.exposed)
            rate = given.bytes / one.step
            print(
                f"{name}, {gpus} | {rate:,.0f} | {rate * seconds_a_byte:.1%} | "
                + " | ".join(f"{seconds * 1e3:.1f}" for seconds in times)
            )


NAMES = ("blt-1b", "blt-8b")

if __name__ == "__main__":
    main()
