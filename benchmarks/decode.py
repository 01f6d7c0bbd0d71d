"""How fast is generation? Against the card's limits, and against transformers.

    python benchmarks/decode.py [check] [one] [batch] [first] [8b] [prefill] [peer] [profile] [--new 512]
    python benchmarks/decode.py [one8] [caches8] [cpu] [leaks --minutes 60]

Random weights of the released shape (blt-1b; blt-8b) in bfloat16 with the published entropy model, the threshold set
so that what the model writes has patches of 4.5 bytes; prompts of 512 random bytes, new bytes drawn at temperature 1.
The limit counts the bytes of weights and caches that must be read, at the speed at which the card copies.

check    float32 on the device: the replayed step's bytes and log-probabilities against plain PyTorch's. KV caches in 8
         bits are shown and not counted: another order of sums may round a key to the next step
one      one sequence;  batch: 64;  8b: one, of the 8B shape
one8     one sequence with weights quantized to int8, to fp8, and as they are
caches8  one, 64 and 256 sequences with KV caches as they are and in 8 bits
first    seconds from a prompt to the first byte
cpu      the demo's BLT on the CPU, against the whole forward pass for every byte
leaks    sequences join, leave and are cancelled for --minutes; memory every twelfth of it
prefill  64 x 8,192 bytes, against the card's matrix rate
peer     transformers' generate
profile  where a step's time goes
"""

import argparse
import time
from itertools import chain
from typing import Any, get_args

import torch

from bytelatent.inference import Decoder, Engine, Sampling
from bytelatent.inference.quantize import quantize_model
from bytelatent.inference.settings import KVCacheNumbers, Quantization
from bytelatent.inference.step import QUORUM, CapturedSlots, PrefillDecoder, engine_for, sampling
from bytelatent.inference.step.prefill import PrefillStack
from bytelatent.model import BLTModel, BLTSettings, ByteLM, build_model, pack_rows, preset
from bytelatent.model.flops import costs
from bytelatent.patching import PatchSettings

PATCH_BYTES = 4.5
DRAW = Sampling(temperature=1.0)


def random_model(settings: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return build_model(settings).eval()
    finally:
        torch.set_default_dtype(before)


def random_prompts(count: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bos = torch.ones(1, dtype=torch.long)
    return [torch.cat([bos, torch.randint(4, 260, [size], generator=generator)]) for _ in range(count)]


def decoder_of(name: str, weights: Quantization = "full", kv_cache: KVCacheNumbers = "full") -> Decoder:
    """A random model, and a threshold that gives patches of 4.5 bytes on what it writes."""
    byte_lm = random_model(preset("entropy"), torch.bfloat16, seed=1)
    byte_lm.output.weight.data.mul_(4)  # else its entropies are so alike that rounding decides about patches
    sampling.EOS = -1  # no text ends, so that all are as long
    model = quantize_model(random_model(preset(name), torch.bfloat16), weights)
    decoder = PrefillDecoder(model, PatchSettings(threshold=5.0), byte_lm, kv_cache)
    for _ in range(2):  # what it writes depends a little on the patches
        decoder.patching = PatchSettings(threshold=threshold_on_own_text(decoder, byte_lm))
    return decoder


def threshold_on_own_text(decoder: Decoder, byte_lm: ByteLM) -> float:
    engine = Engine(decoder, CapturedSlots(decoder, 16), 16)
    asked = [engine.submit(prompt, DRAW, 256)[0] for prompt in random_prompts(16, 512, seed=7)]
    engine.run()
    stream = pack_rows([torch.cat([one.prompt, torch.tensor(one.ids)]) for one in asked]).to("cuda")
    written = byte_lm.entropies(stream)[stream.position > 512]
    return float(written.float().quantile(1 - 1 / PATCH_BYTES))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / seconds_of(lambda: target.copy_(source), 10)


def matrix_rate() -> float:
    """FLOP/s of an 8192-cubed product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return 2 * 8192**3 / seconds_of(lambda: a @ b, 10)


def seconds_of(work: Any, times: int) -> float:
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def lower_bound(decoder: Decoder, rows: int, quorum: float, position: int) -> float:
    """Seconds that reading what a step must read takes: weights once, caches of all rows, and those of the global
    transformer as often as it runs: once a patch for one row, at most once for `quorum` of many rows' patches."""
    model, byte_lm = decoder.model, decoder.byte_lm
    assert isinstance(model, BLTModel)
    assert byte_lm is not None

    def weights(*parts: Any) -> int:  # quantized ones are buffers
        stored = (p for part in parts for p in chain(part.parameters(), part.buffers()))
        return sum(p.numel() * p.element_size() for p in stored)

    def cache(settings: Any, seen: int) -> int:
        head = 2 * settings.head_dim if decoder.kv_cache == "full" else settings.head_dim + 1
        return 2 * settings.num_layers * settings.kv_heads * head * seen

    settings: BLTSettings = model.settings
    inner = byte_lm.settings
    seen = min(position, 512)
    by_byte = weights(byte_lm, model.decoder) + weights(model.encoder) - weights(model.encoder.ngram_hash)
    by_byte += rows * (cache(inner, seen) + cache(settings.encoder, seen) + cache(settings.decoder, seen))
    times = min(1.0, rows / PATCH_BYTES / max(quorum * rows, 1))  # that it runs in a step
    by_patch = weights(model.global_transformer) * times
    by_patch += rows / PATCH_BYTES * cache(settings.global_transformer, int(position / PATCH_BYTES))
    return (by_byte + by_patch) / copy_rate()


def generate(decoder: Decoder, count: int, new: int, quorum: float = 0.0, max_closing: int | None = None) -> None:
    """Warm up, then time `count` sequences of `new` bytes from the first drawn byte on."""
    slots = CapturedSlots(decoder, count, quorum, max_closing)
    engine = Engine(decoder, slots, count)
    began = time.perf_counter()
    for prompt in random_prompts(count, 16, seed=3):
        engine.submit(prompt, DRAW, 24)
    engine.run()
    warm = time.perf_counter() - began
    asked = [engine.submit(prompt, DRAW, new)[0] for prompt in random_prompts(count, 512)]
    engine.advance()
    torch.cuda.synchronize()
    state = slots.step.state
    position, num_patches, first_step = state.position.sum(), state.num_patches.sum(), slots.num_steps
    began = time.perf_counter()
    before = sum(len(one.ids) for one in asked)
    engine.run()
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    drawn = sum(len(one.ids) for one in asked) - before
    patch = float((state.position.sum() - position) / (state.num_patches.sum() - num_patches))
    limit = count / lower_bound(decoder, count, quorum, 512 + new // 2)
    rate = drawn / took
    print(
        f"{count} sequences, quorum {quorum:.2f}, {max_closing or count} closing: {rate:,.0f} bytes/s, "
        f"{rate / limit:.0%} of the limit's {limit:,.0f}; {took / (drawn / count) * 1e3:.3f} ms per byte of each, "
        f"{patch:.2f} bytes per patch, warm-up {warm:.1f} s"
        f", {took / (slots.num_steps - first_step) * 1e3:.3f} ms per step",
        flush=True,
    )


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
        for rows, quorum, max_closing in ((1, 0.0, None), (4, 0.0, None), (4, 0.5, 2), (20, 0.3, None)):
            prompts = ["The", "a longer prompt " * 5, "it", "The", "x"] * max(rows // 4, 1)
            expected = cases.generated(Engine.plain(there, rows), prompts[:rows], 60, sampling)
            engine = Engine(fast, CapturedSlots(fast, rows, quorum, max_closing), rows)
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
                f"check {name}, {weights} weights, {caches} caches, {rows} rows, quorum {quorum}: "
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


def profile(decoder: Decoder, count: int, quorum: float = 0.0) -> None:
    rows = CapturedSlots(decoder, count, quorum)
    engine = Engine(decoder, rows, count)
    for prompt in random_prompts(count, 512):
        engine.submit(prompt, DRAW, 400)
    for _ in range(60):
        engine.advance()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(40):
            engine.advance()
        torch.cuda.synchronize()
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["check", "peer", "one", "first", "prefill", "batch", "8b"])
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=60.0, help="of leaks")
    given = parser.parse_args()
    if "cpu" in given.what:
        cpu()
        return
    if "leaks" in given.what:
        leaks(given.minutes)
        return
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if "check" in given.what:
        check()
    if "peer" in given.what:
        peer()
        torch.cuda.empty_cache()
    if {"one", "batch", "first", "prefill", "profile"} & set(given.what):
        print(f"copy {copy_rate() / 1e12:.2f} TB/s, matrices {matrix_rate() / 1e12:.0f} TFLOP/s")
        decoder = decoder_of("blt-1b")
        if "one" in given.what:
            generate(decoder, 1, given.new)
        if "first" in given.what:
            first(decoder)
        if "batch" in given.what:
            for quorum, max_closing in ((0.0, 24), (QUORUM, None), (0.5, None)):
                generate(decoder, 64, given.new, quorum, max_closing)
        if "prefill" in given.what:
            prefill(decoder)
        if "profile" in given.what:
            profile(decoder, 1)
            profile(decoder, 64, QUORUM)
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
