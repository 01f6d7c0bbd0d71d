"""What 8 bits cost a trained model: bits per byte of a text beside the model as it is.

    python benchmarks/decode_trained.py rounding --model runs/demo --text FILE
    python benchmarks/decode_trained.py caches --model tiny --text FILE [--bytes 200000] [--dtype bfloat16]

rounding  matrices quantized to int8 and fp8
caches    KV caches in 8 bits: the text is read through them, teacher forced, as decode steps do: each byte is predicted
          from caches alone. Also how many patches there are, since entropies differ, and the memory of a slot

FILE holds a text, or JSONL with texts under "text". --step is how many bytes are read at once; the result is the same.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bytelatent import BLT
from bytelatent.inference import Decoder, prompt_ids
from bytelatent.inference.kv_cache import KVCache
from bytelatent.inference.settings import KVCacheNumbers, Quantization

ROWS = 32  # texts at once


def read(name: str, most: int) -> list[bytes]:
    """Texts, `most` bytes of them in all."""
    path, texts, size = Path(name), [], 0
    lines = [json.loads(line)["text"] for line in path.open(encoding="utf-8")] if path.suffix == ".jsonl" else None
    for text in [path.read_bytes()] if lines is None else [line.encode() for line in lines]:
        texts.append(text[: most - size])
        size += len(texts[-1])
    return [text for text in texts if text]


def rounding(model: str, texts: list[bytes], dtype: str) -> None:
    """Bits per byte of texts, by the matrices as they are and by rounded ones."""
    for quantize in get_args(Quantization):
        found = BLT.from_pretrained(model, quantize=quantize, dtype=dtype).bits_per_byte(texts)
        print(f"{quantize}: {found.mean:.4f} bits per byte", flush=True)


def caches(model: str, texts: list[bytes], dtype: str, step: int) -> None:
    """Bits per byte of texts that are read through KV caches."""
    blt = BLT.from_pretrained(model, dtype=dtype)
    pieces = [text[at : at + blt.context - 1] for text in texts for at in range(0, len(text), blt.context - 1)]
    rows = sorted((prompt_ids(piece) for piece in pieces), key=len)
    num_bytes = sum(map(len, rows)) - len(rows)
    print(f"{num_bytes:,} bytes in {len(rows):,} texts of {blt.context - 1:,} at most, {dtype}, on {blt.device}")
    before: Tensor | None = None
    numbers: Any
    for numbers in get_args(KVCacheNumbers):
        decoder = Decoder(blt.model, blt.patching, blt.needed_entropy_model(), numbers)
        found = [scores(decoder, rows[at : at + ROWS], step) for at in range(0, len(rows), ROWS)]
        nats, patches = torch.cat([nats for nats, _, _ in found]), sum(patches for _, patches, _ in found)
        memory = max(found, key=lambda one: one[2])[2]
        bits = float(nats.sum()) / num_bytes / math.log(2)
        more = ""
        if before is not None:  # the error of the mean of differences, text by text
            sizes = torch.tensor([len(row) - 1 for row in rows])
            differences = (nats - before) / math.log(2)
            per_byte = float(differences.sum()) / num_bytes
            error = float((differences - per_byte * sizes).norm()) / num_bytes
            more = f", {per_byte:+.5f} +- {error:.5f}"
        before = nats if before is None else before
        print(f"{numbers}: {bits:.5f} bits per byte{more}; {patches:,} patches; {memory:,.0f} bytes of caches per slot")


@torch.no_grad()
def scores(decoder: Decoder, rows: list[Tensor], step: int) -> tuple[Tensor, int, float]:
    """Nats of each text, the patches of all, and bytes of KV caches per slot."""
    state, logits = decoder.prefill([row[:1] for row in rows], last_only=True)
    nats, logits_of = torch.zeros(len(rows), dtype=torch.float64), list(logits)
    for at in range(1, max(map(len, rows)), step):
        parts = {slot: row[at : at + step].to(decoder.device) for slot, row in enumerate(rows) if len(row) > at}
        slots = torch.cat([torch.full_like(part, slot) for slot, part in parts.items()])
        found = decoder.extend(state, slots, torch.cat(list(parts.values())))
        for (slot, part), after in zip(parts.items(), found.split([len(p) for p in parts.values()]), strict=True):
            before = torch.cat([logits_of[slot][None], after[:-1]]).double().log_softmax(-1)
            nats[slot] -= float(before.gather(1, part[:, None]).sum())
            logits_of[slot] = after[-1]
    found_caches: list[Any] = [cache for cache in vars(state).values() if isinstance(cache, KVCache)]
    memory = sum(table.numel() * table.element_size() for cache in found_caches for table in cache.tables)
    return nats, int(state.num_patches.sum()), memory / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rounding", "caches"])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bytes", type=int, default=10**6, help="of the text to read")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--step", type=int, default=64, help="bytes of a text that are read at once; of caches")
    given = parser.parse_args()
    texts = read(given.text, given.bytes)
    if given.what == "rounding":
        rounding(given.model, texts, given.dtype)
    else:
        caches(given.model, texts, given.dtype, given.step)


if __name__ == "__main__":
    main()
