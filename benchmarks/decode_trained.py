"""What drafts and quantized weights do to a trained model's generation.

    python benchmarks/decode_trained.py drafted --model runs/blt_100m [--rows 64]
    python benchmarks/decode_trained.py rounding --model runs/demo --text FILE

drafted      the captured step with drafts of several lengths (`draft_length`): bytes per step and bytes/s; on CUDA in
             bfloat16. Of several sequences the slowest counts, so fewer bytes seem to be right
rounding     bits per byte of a text by the matrices as they are, and quantized to int8 and fp8
"""

import argparse
import time
from pathlib import Path
from typing import get_args

import torch

from bytelatent import BLT
from bytelatent.inference import Sampling, prompt_ids
from bytelatent.inference.settings import Quantization
from bytelatent.inference.step import engine_for, sampling
from bytelatent.weights import load

PROMPTS = {
    "prose": "The history of the language begins with a small group of people who ",
    "code": "def read(self, path):\n    with open(path) as file:\n        for line in file:\n            ",
    "another script": "\u0418\u0441\u0442\u043e\u0440\u0438\u044f \u044f\u0437\u044b\u043a\u0430 ",
}


def drafted(model: str, batch_size: int, new: int = 1024) -> None:
    """What a trained model keeps of what its local models draft in the captured step, and what that saves."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = load(model)
    blt, byte_lm = found.model.to(device), found.byte_lm
    assert byte_lm is not None
    if device.type == "cuda":
        blt, byte_lm = blt.bfloat16(), byte_lm.to(device).bfloat16()
    sampling.EOS = -1  # no text ends on a GPU, so that all are as long
    plain_rate: dict[tuple[str, float], float] = {}
    print(f"{batch_size} sequences at once, bytes of each")
    columns = ["bytes per step", "drafted bytes right", "ms per step", "bytes/s of all", "times plain"]
    print(" | ".join(["text, temperature, draft length", *columns]))
    for draft_length in (1, 4, 8, 12, 16):
        engine = engine_for(blt, found.config.patching, byte_lm, batch_size, draft_length=draft_length)
        for seed in range(batch_size):
            engine.submit(prompt_ids("warm"), Sampling(seed=seed), 64)
        engine.run()
        for name, prompt in PROMPTS.items():
            for temperature in (0.0, 0.8):
                draws = [Sampling(temperature=temperature, seed=seed) for seed in range(batch_size)]
                asked = [one for draw in draws for one in engine.submit(prompt_ids(prompt), draw, new)]
                engine.advance()
                began, steps = time.perf_counter(), 0
                before = sum(len(one.ids) for one in asked)
                while any(one.ended is None for one in asked):
                    engine.advance()
                    steps += 1
                steps -= len(engine.slots.in_flight)  # type: ignore[attr-defined]
                seconds, drawn = time.perf_counter() - began, sum(len(one.ids) for one in asked) - before
                rate, each = drawn / seconds, drawn / steps / batch_size
                plain = plain_rate.setdefault((name, temperature), rate)
                right = f"{(each - 1) / (draft_length - 1):.0%}" if draft_length > 1 else "-"
                print(
                    f"{name}, {temperature}, {draft_length} | {each:.2f} | {right} | {seconds / steps * 1e3:.3f} | "
                    f"{rate:,.0f} | {rate / plain:.2f}",
                    flush=True,
                )


def rounding(model: str, text: str) -> None:
    """Bits per byte of a text, by the matrices as they are and by rounded ones."""
    data = Path(text).read_bytes()
    for weights in get_args(Quantization):
        found = BLT.from_pretrained(model, quantize=weights).bits_per_byte(data)
        print(f"{weights}: {found:.4f} bits per byte of {len(data):,} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["drafted", "rounding"])
    parser.add_argument("--model", default="runs/demo")
    parser.add_argument("--rows", type=int, default=1, help="sequences at once; of drafted")
    parser.add_argument("--text", help="of rounding")
    given = parser.parse_args()
    if given.what == "drafted":
        drafted(given.model, given.rows)
    else:
        rounding(given.model, given.text or parser.error("rounding: name a --text"))


if __name__ == "__main__":
    main()
