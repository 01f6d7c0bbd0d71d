"""How fast is `blt eval`? On a GPU against prefill, on a CPU by itself.

    python benchmarks/evaluate.py gpu [--megabytes 10] [--preset blt-1b] [--profile]
    python benchmarks/evaluate.py cpu --model runs/demo [--megabytes 0.2] [--batch-sizes 2048,4096,8192]

gpu  random weights as in `decode.py prefill`, in bfloat16 with the published entropy model: prefill as that measures
     it, then text of documents of 200 to 30,000 bytes, patches of about 4.5 bytes, from reading the file to bits per
     byte. Then a part of it in float32, as is the default: the first part must give about the same number
cpu  a model on its held-out text
"""

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bytelatent.evaluation import Measured, PackedModel, ReadSettings, Texts, find_model, measure_texts, packed_model
from bytelatent.model import pack_rows
from bytelatent.patching import PatchSettings
from bytelatent.vocab import encode

CONTEXT = 8192
PART = 400_000  # bytes that are also evaluated in float32


def write_text(path: Path, num_bytes: int, seed: int = 0) -> None:
    """JSONL of made-up words, in documents whose lengths are as likely short as long."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(5000)]
    written = 0
    with path.open("w") as file:
        while written < num_bytes:
            size = int(math.exp(draw.uniform(math.log(200), math.log(30_000))))
            text = " ".join(draw.choices(words, k=size // 6))
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)


def rate(model: PackedModel, texts: Texts) -> tuple[float, float, Measured]:
    """Bytes per second and bits per byte, from reading the files on."""
    measured, began = Measured(), time.perf_counter()
    measure_texts(model, texts, measured)
    took = time.perf_counter() - began
    return sum(measured.num_bytes) / took, measured.bits_per_byte, measured


def gpu(given: Any) -> None:
    from decode import decoder_of, prefill

    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    decoder = decoder_of(given.preset)
    prefill(decoder)
    rates = []
    for _ in range(3):  # the same measure, for the ratio
        torch.cuda.synchronize()
        began = time.perf_counter()
        prefill_once(decoder)
        torch.cuda.synchronize()
        rates.append(64 * 8192 / (time.perf_counter() - began))
    byte_lm, network = decoder.byte_lm, decoder.model
    del decoder
    torch.cuda.empty_cache()
    assert byte_lm is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        write_text(path, int(given.megabytes * 1e6))
        texts = Texts([str(path)])
        some = [
            torch.from_numpy(encode(s.document.text)[:CONTEXT]) for s, _ in zip(texts.read(), range(20), strict=False)
        ]
        entropies = byte_lm.entropies(pack_rows(some).to("cuda")).float()
        patching = PatchSettings(threshold=float(entropies.quantile(1 - 1 / 4.5)))
        for dtype, part in ((torch.bfloat16, None), (torch.float32, PART)):
            how = ReadSettings(torch.device("cuda"), dtype)
            model = packed_model("random", network.to(dtype), patching, byte_lm, CONTEXT, how)
            rate(model, Texts([str(path)], max_bytes=PART))  # compiles
            torch.cuda.reset_peak_memory_stats()
            speed, bits, measured = rate(model, Texts([str(path)], max_bytes=part))
            patch = sum(measured.num_bytes) / sum(measured.num_units)
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"eval in {str(dtype).removeprefix('torch.')}, {sum(measured.num_bytes):,} bytes in "
                f"{len(measured.nats):,} documents: {speed:,.0f} bytes/s, {bits:.4f} bits per byte, "
                f"{patch:.2f} bytes per patch, {memory:.1f} GiB",
                flush=True,
            )
            if dtype == torch.bfloat16:
                print(f"{speed / max(rates):.0%} of prefill's {max(rates):,.0f} bytes/s", flush=True)
                _, bits, _ = rate(model, Texts([str(path)], max_bytes=PART))
                print(f"the first part: {bits:.4f} bits per byte", flush=True)
                if given.profile:
                    profile(model, Texts([str(path)], max_bytes=2 * PART))


def prefill_once(decoder: Any) -> None:
    from decode import random_prompts

    prompts = random_prompts(64, 8191)
    for begin in range(0, 64, 16):
        decoder.prefill(prompts[begin : begin + 16], last_only=True)


def profile(model: PackedModel, texts: Texts) -> None:
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as seen:
        rate(model, texts)
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=60))


def cpu(given: Any) -> None:
    text = Path(given.model) / "text" / "valid.jsonl"
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        for size in map(int, given.batch_sizes.split(",")):
            how = ReadSettings(torch.device("cpu"), batch_ids=size)
            model: Any = find_model(given.model, None, how).load()
            speed, bits, _ = rate(model, Texts([str(text)], max_bytes=int(given.megabytes * 1e6)))
            print(f"{threads} threads, batches of {size}: {speed:,.0f} bytes/s, {bits:.4f} bits per byte", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gpu", "cpu"])
    parser.add_argument("--preset", default="blt-1b")
    parser.add_argument("--model", default="runs/demo")
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--batch-sizes", default="4096")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    {"gpu": gpu, "cpu": cpu}[given.what](given)


if __name__ == "__main__":
    main()
