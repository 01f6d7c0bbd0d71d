"""Speed and memory of data preparation.

    python benchmarks/data.py loader --text corpus/train.jsonl            # bytes/s of one process, CPU
    python benchmarks/data.py loader --text corpus/train.jsonl --minutes 60 --workers 1   # is memory flat?
    python benchmarks/data.py entropies --text corpus/train.jsonl         # the entropy model's shape, on a GPU

The shuffle has a program of its own: benchmarks/shuffle.py.
"""

import argparse
import itertools
import os
import platform
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.profiler import ProfilerActivity, profile

from bytelatent.data import DataSettings, Loader, Patcher, fill_batch, pack, split_document
from bytelatent.data.entropies import EntropySettings, store_entropies
from bytelatent.inference import FastEntropies
from bytelatent.model import ByteLM, ByteLMSettings, Stream, preset
from bytelatent.patching import PatchSettings, calibrate
from bytelatent.text import Document, Stored, read_documents
from bytelatent.text.stored import stored_writer

CONTEXT = 8192
BATCH_BYTES = 65_536
PATCH_BYTES = 4.5
ORIGIN = Stored(byte_lm="made for this benchmark", window=512, context=CONTEXT, dtype="bfloat16")


def documents(text: str, max_bytes: int) -> Iterator[Document]:
    """About so many bytes of documents."""
    left = max_bytes
    for _, document in read_documents(text):
        if left <= 0:
            return
        left -= len(document.text)
        yield document


def store(text: str, folder: Path, max_bytes: int) -> PatchSettings:
    """Write the text with made-up entropies, and with the starts of the patching settings for patches of 4.5 bytes.

    The values are drawn like a byte LM's: most near zero, some high. What they are does not change the work.
    """
    random = np.random.default_rng(0)
    sample = torch.from_numpy(random.gamma(0.6, 1.2, 200_000).astype(np.float32))
    ids, position = torch.full([len(sample)], 100), torch.arange(len(sample))
    threshold = calibrate(ids, sample, position, PATCH_BYTES).threshold
    patching = PatchSettings(mode="entropy", threshold=threshold)
    starts = ORIGIN.model_copy(update={"patching": patching.plain()})
    names = (folder / "entropies.parquet", folder / "starts.parquet")
    with stored_writer(names[0], ORIGIN) as first, stored_writer(names[1], starts) as second:
        for number, document in enumerate(documents(text, max_bytes)):
            entropies = random.gamma(0.6, 1.2, len(document.text) + 1).astype(np.float32)
            first.add(str(number), document.text, entropies)
            begins = entropies > threshold
            begins[0] = True
            second.add(str(number), document.text, begins)
    return patching


def resident_bytes(pid: int | str = "self") -> int:
    """Memory that a process holds, proportionally where it is shared."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def of_all(loader: Loader) -> int:
    pool = loader.pool._pool
    return resident_bytes() + sum(resident_bytes(pid) for pid in (list(pool._processes) if pool else []))


def measure_loader(
    text: str, megabytes: int, workers: int, minutes: float, kinds: list[str], pace: float | None
) -> None:
    """Batches of one process as fast as they come: read, cut, shuffled, patched, packed."""
    with tempfile.TemporaryDirectory() as folder:
        patching = store(text, Path(folder), megabytes * 1_000_000)
        for kind in kinds:
            train = [f"{folder}/{kind}.parquet"]
            settings = DataSettings.parse(
                {"train": train, "context": CONTEXT, "batch_bytes": BATCH_BYTES, "batch_patches": BATCH_BYTES // 4}
                | {"workers": workers}
            )
            with Loader(settings, 0, Patcher(patching)) as loader:
                run_loader(loader, kind, minutes, workers, pace)


def run_loader(loader: Loader, kind: str, minutes: float, workers: int, pace: float | None) -> None:
    for _ in range(8):  # fills the shuffle buffer, starts the processes
        next(loader)
    begin, busy, num_bytes = time.perf_counter(), time.process_time(), 0
    report, memory = begin, [of_all(loader)]
    for number in itertools.count():
        num_bytes += next(loader).num_bytes
        if pace is not None:
            time.sleep(max(num_bytes / pace - (time.perf_counter() - begin), 0))
        now = time.perf_counter()
        if now - report > max(minutes * 60 / 12, 1):
            report = now
            memory.append(of_all(loader))
            if minutes > 1:
                print(f"  {(now - begin) / 60:5.1f} min {number:8,} batches {memory[-1] / 2**20:8.1f} MiB", flush=True)
        if now - begin > minutes * 60:
            break
    seconds, cpu = time.perf_counter() - begin, time.process_time() - busy
    half = len(memory) // 2
    print(
        f"{kind:10s} workers {workers}: {num_bytes / seconds / 1e6:6.2f} million bytes/s "
        f"({num_bytes / cpu / 1e6:.2f} a second of this process's CPU time), {seconds:.0f} s, memory "
        f"{memory[0] / 2**20:.0f} MiB at first, {np.mean(memory[:half] or memory) / 2**20:.0f} in the first half, "
        f"{np.mean(memory[half:]) / 2**20:.0f} in the second",
        flush=True,
    )


def entropy_model(device: str) -> ByteLM:
    """The published entropy model's shape: 14 layers of 768, window 512. Fresh weights do not change the work."""
    torch.manual_seed(0)
    settings = preset("entropy")
    assert isinstance(settings, ByteLMSettings)
    return ByteLM(settings).to(device).eval()


def seconds_of(call: Callable[[], object], times: int = 10) -> float:
    """Mean seconds of a call on the GPU, after it is warm."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / times


def measure_entropies(text: str, megabytes: int) -> None:
    """The forward pass alone, then Parquet to Parquet."""
    byte_lm = entropy_model("cuda")
    fast = FastEntropies(byte_lm)
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/text.parquet"
        found = list(documents(text, megabytes * 1_000_000))
        table = {"id": [str(n) for n in range(len(found))], "text": [document.text for document in found]}
        pq.write_table(pa.table(table), source, row_group_size=1000)
        for size in (32_768, 65_536, 131_072):
            stream = full_stream(found, size).to("cuda")
            if size == 32_768:
                check_against_float32(byte_lm, fast, stream)
            seconds = seconds_of(lambda stream=stream: fast(stream), times=20)
            print(f"forward alone, {size:7,} ids: {size / seconds / 1e6:.3f} million bytes/s", flush=True)
        show_profile(lambda: fast(stream))
        for patching in (None, PatchSettings(mode="entropy", threshold=1.34)):
            settings = EntropySettings(patching=patching)
            out = Path(folder, "starts" if patching else "entropies")
            summary = store_entropies(byte_lm, "benchmark", [source], out, settings, entropies_of=fast)
            stored = sum(file.stat().st_size for file in out.glob("*.parquet"))
            print(
                f"Parquet to Parquet, {out.name}: {summary.num_bytes / summary.seconds / 1e6:.3f} million bytes/s, "
                f"{summary.num_bytes:,} bytes in {summary.seconds:.1f} s, {stored:,} bytes stored",
                flush=True,
            )


def show_profile(call: Callable[[], object]) -> None:
    """Where one call's time on the GPU goes."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda kernel: -kernel.device_time_total)
    total = sum(kernel.device_time_total for kernel in kernels)
    for kernel in kernels[:8]:
        share = kernel.device_time_total / total
        print(
            f"  {kernel.device_time_total / 1000:7.2f} ms {share:6.1%} {kernel.count:4d} x {kernel.key[:70]}",
            flush=True,
        )


def full_stream(found: list[Document], size: int) -> Stream:
    """Real text that fills a batch, the last document cut."""
    pieces = (piece for document in found for piece in split_document(document, CONTEXT))
    return pack(fill_batch(deque(itertools.islice(pieces, size)), size, None, lambda: False)).stream


@torch.no_grad()
def check_against_float32(byte_lm: ByteLM, fast: FastEntropies, stream: Stream) -> None:
    """How far the kernels in bfloat16, and the plain model under autocast, are from float32."""
    exact = byte_lm.entropies(stream)
    with torch.autocast("cuda", torch.bfloat16):
        autocast = byte_lm.entropies(stream)
    real = stream.document >= 0
    for name, found in (("kernels", fast(stream)), ("autocast", autocast)):
        error = (found - exact)[real].abs()
        print(
            f"{name} in bfloat16 against float32: mean error {error.mean():.4f} nats, largest {error.max():.3f}, "
            f"entropies {exact[real].mean():.2f} +- {exact[real].std():.2f}",
            flush=True,
        )
    assert (fast(stream) - exact)[real].abs().mean() < 0.03, "the kernels are not the byte LM"


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["loader", "entropies"])
    parser.add_argument("--text", required=True, help="JSONL or Parquet with real text")
    parser.add_argument("--megabytes", type=int, default=100, help="text to use")
    parser.add_argument("--minutes", type=float, default=0.3, help="how long a measurement takes")
    parser.add_argument("--workers", type=int, default=0, help="reading processes")
    parser.add_argument("--kinds", nargs="+", default=["entropies", "starts"])
    parser.add_argument("--pace", type=float, help="bytes/s to hold to, as a training run would")
    options = parser.parse_args()
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}")
    if options.part == "entropies":
        measure_entropies(options.text, options.megabytes)
        return
    torch.set_num_threads(1)
    measure_loader(options.text, options.megabytes, options.workers, options.minutes, options.kinds, options.pace)


if __name__ == "__main__":
    main()
