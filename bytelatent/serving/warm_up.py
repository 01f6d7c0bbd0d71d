"""What an engine on a GPU does before the first request, so that no request waits for it."""

import torch

from bytelatent.inference import Engine, Sampling
from bytelatent.inference.kv_cache import CacheCapacity
from bytelatent.inference.prompts import PromptQueue
from bytelatent.inference.step import CapturedSlots, SizedSlots

LONG = 8192  # bytes of the longest prompt that warms up
MEMORY_SHARE = 0.5  # of free memory, that caches may take


def reserve(engine: Engine, context: int) -> None:
    """Let the caches hold texts as long as the context before the first request, where memory allows.

    A step is captured again when its caches grow, and meanwhile all streams wait.
    """
    slots = engine.slots
    for each in slots.sets.values() if isinstance(slots, SizedSlots) else [slots]:
        if isinstance(each, CapturedSlots):
            room, free = CacheCapacity(context, context // 2), torch.cuda.mem_get_info()[0]
            if each.more_bytes(room) < free * MEMORY_SHARE:
                each.reserve(room)


def warm_up(engine: Engine, batch_size: int, chunk: int) -> None:
    """Compile kernels, and capture the steps of all sets of slots and the reading of prompts of all lengths, so that no
    request waits for that."""
    slots = engine.slots
    for size in slots.sets if isinstance(slots, SizedSlots) else [batch_size]:
        engine.submit(b"a b " * 128, Sampling(), 2, size)
        engine.run()
    prompts = PromptQueue(engine.decoder, chunk)  # without slots, whose caches would grow with the longest one
    sizes = [size for size in (100, 200, 400, 800, 1600, 3200) if size < chunk]  # bytes
    for size in (*sizes, min(chunk, LONG) * 3 // 2 + 4):  # the last one in two pieces
        prompts.add(engine.asked(b"a b " * (size // 4), Sampling(), 1))
        while not prompts.ready:
            prompts.read(1)
        prompts.take(1)
