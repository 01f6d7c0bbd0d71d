"""What quantized weights cost a trained model: bits per byte of a text, beside the weights as they are.

python benchmarks/decode_trained.py rounding --model runs/demo --text FILE
"""

import argparse
from pathlib import Path
from typing import get_args

from bytelatent import BLT
from bytelatent.inference.settings import Quantization


def rounding(model: str, text: str) -> None:
    """Bits per byte of a text, by the matrices as they are and by rounded ones."""
    data = Path(text).read_bytes()
    for weights in get_args(Quantization):
        found = BLT.from_pretrained(model, quantize=weights).bits_per_byte(data)
        print(f"{weights}: {found:.4f} bits per byte of {len(data):,} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rounding"])
    parser.add_argument("--model", default="runs/demo")
    parser.add_argument("--text", required=True)
    given = parser.parse_args()
    rounding(given.model, given.text)


if __name__ == "__main__":
    main()
