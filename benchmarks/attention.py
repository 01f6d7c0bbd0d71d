"""Attention of many sequences in a decoding step, against the speed at which the card copies.

    python benchmarks/attention.py [--rows 64] [--waiting 0 20]

Windows and heads of the byte LM and the local models, and the global transformer's patches, of the released 1B shape.
Each layer has its own cache, so that none is in the card's; all layers follow one another in a CUDA graph with
overlapped launches. Rows that wait are passed over, and their caches are not counted. The launch in use comes first.
"""

import argparse
from itertools import product

import torch
from decode_models import copy_rate, seconds_of

from bytelatent.kernels.decode_attention import (
    AttentionLaunch,
    decode_attention,
    launch_for_attention,
    plain_decode_attention,
)
from bytelatent.kernels.launch import overlapped
from bytelatent.kernels.rotary import rotary_embedding

# Heads, head size, layers, slots of a row, window, position
SHAPES = {
    "byte LM": (12, 64, 14, 544, 512, 700),
    "local models": (16, 64, 10, 544, 512, 700),
    "global transformer": (16, 128, 12, 512, None, 240),
}
LAUNCHES = [AttentionLaunch(block, 1, *how) for block, how in product((32, 64, 128), ((4, 2), (4, 3), (2, 2)))]


def measure(name: str, rows: int, waiting: int, rate: float) -> None:
    heads, size, layers, slots, window, position = SHAPES[name]
    k = torch.randn(layers, rows, slots, heads, size, device="cuda", dtype=torch.bfloat16)
    v = torch.randn_like(k)
    qkv = torch.randn(rows, 3 * heads * size, device="cuda", dtype=torch.bfloat16)
    position_B = position - torch.arange(rows, device="cuda") % 100
    row_B = torch.arange(rows, device="cuda")
    row_B[torch.randperm(rows, device="cuda")[:waiting]] = -1
    rotary = rotary_embedding(torch.arange(position + 1, device="cuda"), size, 1e4)
    given = {"heads": heads, "window": window, "row_B": row_B}
    seen = position_B[row_B >= 0].clamp(max=(window or position) - 1)
    num_bytes = int(seen.sum()) * heads * size * 2 * k.element_size()
    print(f"{name}, {rows} rows, {waiting} wait: {num_bytes / 1e6:.0f} MB a layer, {num_bytes / rate * 1e6:.1f} us")
    expected = plain_decode_attention(qkv, k[0].clone(), v[0].clone(), position_B, rotary, **given)
    for launch in (launch_for_attention(rows, heads, heads, window or slots), *LAUNCHES):
        found = decode_attention(qkv, k[0], v[0], position_B, rotary, launch=launch, **given)
        far = float((found - expected)[row_B >= 0].abs().max())
        assert far < 0.02, f"{launch}: {far}"
        graph = torch.cuda.CUDAGraph()
        with overlapped(), torch.cuda.graph(graph):
            for layer in range(layers):
                decode_attention(qkv, k[layer], v[layer], position_B, rotary, launch=launch, **given)
        took = seconds_of(graph.replay, 10) / layers
        print(f"  {took * 1e6:6.1f} us, {num_bytes / took / rate:4.0%} of the copy's speed: {launch}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 20])
    given = parser.parse_args()
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s")
    for name, waiting in product(SHAPES, given.waiting):
        measure(name, given.rows, waiting, rate)


if __name__ == "__main__":
    main()
