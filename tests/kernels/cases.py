"""What `test_kernels.py` runs in Triton's interpreter, and benchmarks/device.py on a GPU: errors as JSON."""

import json
import sys

import torch

from bytelatent.inference import FastEntropies
from bytelatent.kernels.gated_product import gated_product, interleaved, plain_gated_product, plain_row_scale, row_scale
from bytelatent.kernels.rotary import cos_sin
from bytelatent.kernels.window_attention import BLOCK, first_seen, plain_window_attention, window_attention
from bytelatent.model import ByteLM, ByteLMSettings
from tests.kernels.streams import stream_of_sizes


def attention(window: int | None, sizes: list[int], heads: int, head_dim: int) -> dict[str, float]:
    assert sum(sizes) % BLOCK == 0
    stream = stream_of_sizes(sizes)
    qkv = torch.randn(sum(sizes), 3, heads, head_dim)
    low, (cos, sin) = first_seen(stream.position, window), cos_sin(stream.position, head_dim, 10_000.0)
    expected = plain_window_attention(*qkv.clone().unbind(1), low, cos, sin)
    found = window_attention(*qkv.unbind(1), low, cos, sin)
    return {"error": float((found - expected).abs().max()), "scale": float(expected.std())}


def product(rows: int, width: int, dim: int) -> dict[str, float]:
    x, matrix = torch.randn(rows, dim), interleaved(*(torch.randn(2, width, dim) / dim**0.5))
    scale = torch.rand(rows) + 0.5
    expected = plain_gated_product(x, scale, matrix)
    found = gated_product(x, scale, matrix)
    return {
        "error": float((found - expected).abs().max()),
        "row_scale_error": float((row_scale(x, 1e-5) - plain_row_scale(x, 1e-5)).abs().max()),
        "scale": float(expected.std()),
    }


def byte_lm(sizes: list[int], padding: int) -> dict[str, float]:
    settings = ByteLMSettings(dim=64, num_layers=2, num_heads=4, window=20, multiple_of=128)
    model = ByteLM(settings)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    torch.nn.init.normal_(model.output.weight, std=0.5)  # so that some bytes are easy to guess
    stream = stream_of_sizes(sizes, padding)
    assert FastEntropies.supports(settings)
    expected = model.entropies(stream)
    found = FastEntropies(model, torch.float32)(stream)
    real = stream.document >= 0
    return {"error": float((found - expected)[real].abs().max()), "spread": float(expected[real].std())}


CASES = {"attention": attention, "gated_product": product, "byte_lm": byte_lm}


def run(cases: list[tuple[str, dict]]) -> list[dict]:
    torch.manual_seed(0)
    return [CASES[name](**arguments) for name, arguments in cases]


if __name__ == "__main__":
    print(json.dumps(run([(sys.argv[1], json.loads(sys.argv[2]))])[0]))
