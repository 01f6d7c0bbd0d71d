"""How fast is generation? Against the card's limits, and against transformers.

    python benchmarks/decode.py [check] [one] [batch] [first] [8b] [prefill] [peer] [--new 512]
    python benchmarks/decode.py profile [--apart] [--slots 1 64] [--model blt-1b] [--quorum 0.33] [--closing 32]
                                [--beside] [--cublas 64] [--spread]
    python benchmarks/decode.py slots [--slots 1 4 16 64 128 256] [--new 512] and the same options
    python benchmarks/decode.py [one8] [caches8] [cpu] [leaks --minutes 60]

Random weights of the released shape (blt-1b; blt-8b) in bfloat16 with the published entropy model, the threshold set
so that what the model writes has patches of 4.5 bytes; prompts of 512 random bytes, new bytes drawn at temperature 1.
The limit counts the bytes of weights and caches that must be read, at the speed at which the card copies.

check    float32 on the device: the replayed step's bytes and log-probabilities against plain PyTorch's. KV caches in 8
         bits are shown and not counted: another order of sums may round a key to the next step
one      one sequence;  batch: 64, also with the global transformer beside other slots' bytes;  8b: one, of the 8B shape
one8     one sequence with weights quantized to int8, to fp8, and as they are
caches8  one, 64 and 256 sequences with KV caches as they are and in 8 bits
first    seconds from a prompt to the first byte
cpu      the demo's BLT on the CPU, against the whole forward pass for every byte
leaks    sequences join, leave and are cancelled for --minutes; memory every twelfth of it
prefill  64 x 8,192 bytes, against the card's matrix rate
peer     transformers' generate
profile  the kernels of a step: launches, microseconds of each, share of the step. Launches overlap and the entropy
         model runs beside encoder and decoder, so these times include waiting; with --apart kernels follow one another
slots    a table by slots: bytes/s, share of the limit, milliseconds per step, time to first byte, memory

Without a GPU `profile` and `slots` run the plain step on the CPU: --model demo-blt.
"""

import argparse
import time
from typing import Any, get_args

import torch
from decode_models import DEVICE, DRAW, PATCH_BYTES, copy_rate, decoder_of, matrix_rate, random_prompts
from decode_slots import Closing, generate, profile, spread, table

from bytelatent.inference import Decoder, Engine, Sampling
from bytelatent.inference.quantize import quantize_model
from bytelatent.inference.settings import KVCacheNumbers, Quantization
from bytelatent.inference.step import QUORUM, CapturedSlots, PrefillDecoder, engine_for
from bytelatent.inference.step.prefill import PrefillStack
from bytelatent.kernels import skinny_linear
from bytelatent.model import build_model, pack_rows, preset
from bytelatent.model.flops import costs
from bytelatent.patching import PatchSettings


def check() -> None:
    """Compare the captured step with plain PyTorch; exit code 1 if a sequence differs."""
    from tests.inference import test_engine as cases

    sampling = Sampling(temperature=1.0, seed=3, top_p=0.9)
    num_unequal = 0
    kinds: list[Any] = [(n, "full", "full") for n in (*cases.NAMES, *cases.OTHERS)]
    kinds += [("entropy", "int8", "full"), ("entropy", "fp8", "full")]
    kinds += [(name, "full", "int8") for name in ("byte LM", "entropy", "all layers")]
    for name, weights, caches in kinds:
        plain = cases.decoder_of(name)
        for part in (plain.model, plain.byte_lm):
            if part is not None:
                part.cuda()
        model = quantize_model(plain.model, weights)
        there = Decoder(model, plain.patching, plain.byte_lm, caches)
        fast = PrefillDecoder(model, plain.patching, plain.byte_lm, caches)
        inline = ((1, 0.0, None, False), (4, 0.0, None, False), (4, 0.5, 2, False), (20, 0.3, None, False))
        beside = ((1, 0.0, None, True), (4, 0.5, 2, True), (20, 0.3, None, True))
        for rows, quorum, max_closing, is_beside in inline + beside:
            prompts = ["The", "a longer prompt " * 5, "it", "The", "x"] * max(rows // 4, 1)
            expected = cases.generated(Engine.plain(there, rows), prompts[:rows], 60, sampling)
            slots = CapturedSlots(fast, rows, quorum, max_closing, beside=is_beside)
            engine = Engine(fast, slots, rows)
            found = cases.generated(engine, prompts[:rows], 60, sampling)
            same, far = 0, 0.0
            for one, other in zip(found, expected, strict=True):
                same += one.ids == other.ids
                pairs = zip(one.ids, other.ids, one.log_probabilities, other.log_probabilities, strict=False)
                for a, b, p, q in pairs:
                    if a != b:
                        break
                    far = max(far, abs(p - q))
            num_unequal += rows - same if caches == "full" else 0
            print(
                f"check {name}, {weights} weights, {caches} caches, {rows} rows, quorum {quorum}"
                f"{', beside' * is_beside}: "
                f"{same} of {rows} equal, log-probabilities {far:.1e}"
            )
    if num_unequal:
        raise SystemExit(f"{num_unequal} sequences are not equal")


def cpu() -> None:
    """The demo's BLT on this CPU: a byte at position 1,000, with a KV cache and by the whole forward pass."""
    from bytelatent.model import add_patches
    from bytelatent.patching import next_starts

    torch.manual_seed(0)
    byte_lm: Any = build_model(preset("demo-byte-lm")).eval()
    model: Any = build_model(preset("demo-blt")).eval()
    byte_lm.output.weight.data.mul_(4)
    [row] = random_prompts(1, 999)
    threshold = float(byte_lm.entropies(pack_rows([row]))[64:].quantile(1 - 1 / PATCH_BYTES))
    patching = PatchSettings(threshold=threshold)
    decoder = Decoder(model, patching, byte_lm)

    def whole() -> None:
        stream = pack_rows([row])
        starts = next_starts(stream.ids, byte_lm.entropies(stream), stream.position, patching)
        with torch.no_grad():
            model(add_patches(stream, starts))

    times: dict[str, list[float]] = {"whole forward pass": [], "with a KV cache": []}
    engine = Engine(decoder, CapturedSlots(decoder, 1), 1)
    whole()
    [asked] = engine.submit(row, DRAW.model_copy(update={"seed": 5}), 200)
    engine.advance()
    for _ in range(10):  # in turns, as the machine's speed drifts; each often enough to find its weights in the cache
        for _ in range(3):
            began = time.perf_counter()
            whole()
            times["whole forward pass"].append(time.perf_counter() - began)
        for _ in range(40):
            if asked.ended is not None:
                [asked] = engine.submit(row, DRAW, 200)
                engine.advance()
            began = time.perf_counter()
            engine.advance()
            times["with a KV cache"].append(time.perf_counter() - began)
    middle = {name: sum(values) / len(values) for name, values in times.items()}
    for name, seconds in middle.items():
        print(f"{name}: {seconds * 1e3:.2f} ms per byte, {1 / seconds:,.0f} bytes/s")
    print(f"{middle['whole forward pass'] / middle['with a KV cache']:.1f} times as fast")


def leaks(minutes: float) -> None:
    """Sequences of the demo's BLT join, leave and are cancelled at random; does memory grow?"""
    import random
    import resource

    torch.manual_seed(0)
    byte_lm: Any = build_model(preset("demo-byte-lm")).eval()
    model: Any = build_model(preset("demo-blt")).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = engine_for(model.to(device), PatchSettings(threshold=5.0), byte_lm.to(device), 8)
    chance, going, done, began, shown = random.Random(0), [], 0, time.monotonic(), 0.0
    while (now := time.monotonic() - began) < minutes * 60:
        if len(going) < 16 and chance.random() < 0.2:
            [prompt] = random_prompts(1, chance.randrange(1, 600), seed=chance.randrange(10**6))
            going += engine.submit(prompt, Sampling(temperature=1.0, seed=done), chance.randrange(1, 400))
        if going and chance.random() < 0.01:
            engine.cancel(chance.choice(going))
        engine.advance()
        done += sum(one.ended is not None for one in going)
        going = [one for one in going if one.ended is None]
        if now - shown > minutes * 60 / 12:
            shown = now
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * resource.getpagesize() / 2**20
            on_device = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else 0.0
            print(
                f"{now / 60:.1f} min: {done} sequences, {resident:.0f} MiB, {on_device:.0f} on the device", flush=True
            )


def first(decoder: Decoder) -> None:
    sizes, prompts = PrefillStack.SIZES, random_prompts(1, 500)
    captured = [decoder.prefill(prompts, last_only=True)[1] for _ in "ab"]
    PrefillStack.SIZES = ()
    far = max(float((found - decoder.prefill(prompts, last_only=True)[1]).abs().max()) for found in captured)
    PrefillStack.SIZES = sizes
    print(f"a prompt read by graphs and without: logits differ by {far:.1e} at most")
    engine = Engine(decoder, CapturedSlots(decoder, 1), 1)
    times = []
    for number in range(8):
        [prompt] = random_prompts(1, 512, seed=number)
        torch.cuda.synchronize()
        began = time.perf_counter()
        [asked] = engine.submit(prompt, DRAW, 64)
        while not asked.ids:
            engine.advance()
        times.append(time.perf_counter() - began)
        engine.run()
    middle = sorted(times[2:])[len(times[2:]) // 2]
    print(f"first byte after 512: {middle * 1e3:.1f} ms (all: {[round(t * 1e3, 1) for t in times]})", flush=True)


def prefill(decoder: Decoder) -> None:
    prompts = random_prompts(64, 8191)
    model: Any = decoder.model
    flops = sum(part.flops_per_byte for part in costs(model.settings, PATCH_BYTES, 8192))
    flops += sum(part.flops_per_byte for part in costs(decoder.byte_lm.settings, PATCH_BYTES, 8192))  # type: ignore
    for group in (8, 16):

        def work(group: int = group) -> None:
            for begin in range(0, 64, group):
                decoder.prefill(prompts[begin : begin + group], last_only=True)

        work()
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        rate = 64 * 8192 / took
        print(
            f"prefill, {group} at once: {rate:,.0f} bytes/s, {rate * flops / matrix_rate():.0%} of the matrix rate",
            flush=True,
        )


def peer() -> None:
    from transformers import BltConfig, BltForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: Any = BltForCausalLM(BltConfig(use_cache=False)).eval()
    torch.set_default_dtype(torch.float32)
    [prompt] = random_prompts(1, 512)
    ids = prompt[None].cuda()
    model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    torch.cuda.synchronize()
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, use_cache=False)
    torch.cuda.synchronize()
    print(f"transformers' generate: {64 / (time.perf_counter() - began):.1f} bytes/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["check", "peer", "one", "first", "prefill", "batch", "8b"])
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=60.0, help="of leaks")
    parser.add_argument("--slots", type=int, nargs="+", help="of profile and slots")
    parser.add_argument("--model", default="blt-1b", help="preset, of profile and slots")
    parser.add_argument("--quorum", type=float, default=QUORUM, help="of profile and slots")
    parser.add_argument("--closing", type=int, help="slots that close a patch in a step at most, of profile and slots")
    parser.add_argument("--beside", action="store_true", help="of profile and slots: see `CapturedSlots`")
    parser.add_argument("--cublas", type=int, help="slots above which cuBLAS multiplies, likewise")
    parser.add_argument("--spread", action="store_true", help="products in more, smaller programs: see `spread`")
    parser.add_argument("--apart", action="store_true", help="profile: launches do not overlap, and share one stream")
    given = parser.parse_args()
    if "cpu" in given.what:
        cpu()
        return
    if "leaks" in given.what:
        leaks(given.minutes)
        return
    print(torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", torch.__version__, flush=True)
    if {"profile", "slots"} & set(given.what):
        decoder, closing = decoder_of(given.model), Closing(given.quorum, given.closing, given.beside)
        if given.cublas is not None:
            skinny_linear.LIBRARY_FROM = given.cublas
        if given.spread:
            skinny_linear.launch_for = spread
        if "profile" in given.what:
            for count in given.slots or (1, 64):
                profile(decoder, count, given.apart, closing)
        if "slots" in given.what:
            table(decoder, given.slots or (1, 4, 16, 64, 128, 256), given.new, closing)
        del decoder
        torch.cuda.empty_cache()
    if "check" in given.what:
        check()
    if "peer" in given.what:
        peer()
        torch.cuda.empty_cache()
    if {"one", "batch", "first", "prefill"} & set(given.what):
        print(f"copy {copy_rate() / 1e12:.2f} TB/s, matrices {matrix_rate() / 1e12:.0f} TFLOP/s")
        decoder = decoder_of("blt-1b")
        if "one" in given.what:
            generate(decoder, 1, given.new)
        if "first" in given.what:
            first(decoder)
        if "batch" in given.what:
            for quorum, max_closing in ((0.0, 24), (QUORUM, None), (0.5, None)):
                generate(decoder, 64, given.new, quorum, max_closing)
            for quorum in (0.0, 0.1, 0.2, QUORUM):
                generate(decoder, 64, given.new, quorum, beside=True)
        if "prefill" in given.what:
            prefill(decoder)
        del decoder
        torch.cuda.empty_cache()
    if "one8" in given.what:
        print(f"copy {copy_rate() / 1e12:.2f} TB/s")
        for weights in get_args(Quantization):
            print(f"{weights} weights: ", end="")
            generate(decoder_of("blt-1b", weights=weights), 1, given.new)
            torch.cuda.empty_cache()
    if "caches8" in given.what:
        print(f"copy {copy_rate() / 1e12:.2f} TB/s")
        for kv_cache in get_args(KVCacheNumbers):
            decoder = decoder_of("blt-1b", kv_cache=kv_cache)
            for count in (1, 64, 256):
                print(f"{kv_cache} caches: ", end="")
                generate(decoder, count, given.new, QUORUM if count > 1 else 0.0)
            del decoder
            torch.cuda.empty_cache()
    if "8b" in given.what:
        generate(decoder_of("blt-8b"), 1, given.new)


if __name__ == "__main__":
    main()
