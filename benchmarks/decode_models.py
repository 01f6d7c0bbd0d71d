"""Models with random weights for `decode.py`, prompts for them, and the limit of their speed."""

import time
from itertools import chain
from typing import Any

import torch

from bytelatent.inference import Decoder, Engine, Sampling
from bytelatent.inference.quantize import quantize_model
from bytelatent.inference.settings import KVCacheNumbers, Quantization
from bytelatent.inference.step import CapturedSlots, PrefillDecoder, sampling
from bytelatent.model import BLTModel, BLTSettings, ByteLM, build_model, pack_rows, preset
from bytelatent.patching import PatchSettings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATCH_BYTES = 4.5
DRAW = Sampling(temperature=1.0)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def random_model(settings: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return build_model(settings).eval()
    finally:
        torch.set_default_dtype(before)


def random_prompts(count: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bos = torch.ones(1, dtype=torch.long)
    return [torch.cat([bos, torch.randint(4, 260, [size], generator=generator)]) for _ in range(count)]


def decoder_of(name: str, weights: Quantization = "full", kv_cache: KVCacheNumbers = "full") -> Decoder:
    """A random model, and a threshold that gives patches of 4.5 bytes on what it writes."""
    byte_lm = random_model(preset("demo-byte-lm" if name.startswith("demo") else "entropy"), torch.bfloat16, seed=1)
    byte_lm.output.weight.data.mul_(4)  # else its entropies are so alike that rounding decides about patches
    sampling.EOS = -1  # no text ends, so that all are as long
    model = quantize_model(random_model(preset(name), torch.bfloat16), weights)
    decoder = (PrefillDecoder if DEVICE == "cuda" else Decoder)(model, PatchSettings(threshold=5.0), byte_lm, kv_cache)
    for _ in range(2):  # what it writes depends a little on the patches
        decoder.patching = PatchSettings(threshold=threshold_on_own_text(decoder, byte_lm))
    return decoder


def threshold_on_own_text(decoder: Decoder, byte_lm: ByteLM) -> float:
    engine = Engine(decoder, CapturedSlots(decoder, 16), 16)
    asked = [engine.submit(prompt, DRAW, 256)[0] for prompt in random_prompts(16, 512, seed=7)]
    engine.run()
    stream = pack_rows([torch.cat([one.prompt, torch.tensor(one.ids)]) for one in asked]).to(DEVICE)
    written = byte_lm.entropies(stream)[stream.position > 512]
    return float(written.float().quantile(1 - 1 / PATCH_BYTES))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(2**30 if DEVICE == "cuda" else 2**26, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * len(source) / seconds_of(lambda: target.copy_(source), 10)


def matrix_rate() -> float:
    """FLOP/s of an 8192-cubed product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return 2 * 8192**3 / seconds_of(lambda: a @ b, 10)


def seconds_of(work: Any, times: int) -> float:
    for _ in range(3):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
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
