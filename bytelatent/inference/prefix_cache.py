"""States of prompts, for prompts that begin alike.

The ring of a windowed KV cache holds its newest positions only, so a state cannot be taken back to an earlier byte.
What is kept are copies, taken where a later prompt may go on from: at the end of each prompt, at the end of what was
generated, and where two prompts were seen to part.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bytelatent.inference.kv_cache import DecodeState

SHORTEST = 256  # ids; reading fewer again costs about as much as copying their state
NUM_RECENT = 64  # prompts that a new one is compared with
RECENT_IDS = 1 << 22  # of them in all


@dataclass(frozen=True)
class Prefix:
    """What a model knows once it has read some ids.

    Attributes:
        state: for `DecodeState.put`.
        slot: of the state.
        logits: [V] of what comes next.
    """

    num_ids: int
    state: DecodeState
    logits: Tensor
    slot: int = 0

    @property
    def num_bytes(self) -> int:
        return self.state.num_bytes + self.logits.numel() * self.logits.element_size()


class PrefixCache:
    """Prefixes by their ids; the least recently used ones make room for new ones.

    Args:
        max_bytes: memory that they may take.
        shortest: ids of the shortest prefix that is kept.

    Attributes:
        num_bytes: memory that they take.
        lookups, hits, num_reused: prompts that were looked for, those of which a part was found, and its ids.
    """

    def __init__(self, max_bytes: int, shortest: int = SHORTEST):
        self.max_bytes, self.shortest = max_bytes, shortest
        self.num_bytes = self.lookups = self.hits = self.num_reused = 0
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        self._recent: deque[np.ndarray] = deque(maxlen=NUM_RECENT)

    def find(self, ids: Tensor) -> Prefix | None:
        """The longest prefix of a prompt [N]."""
        if len(ids) < self.shortest:
            return None
        self.lookups += 1
        key = _key(ids)
        found = max((other for other in self._prefixes if key.startswith(other)), key=len, default=None)
        if found is None:
            return None
        self._prefixes.move_to_end(found)
        prefix = self._prefixes[found]
        self.hits += 1
        self.num_reused += prefix.num_ids
        return prefix

    def parting(self, ids: Tensor, after: int) -> int | None:
        """How many first ids of a prompt [N] a recent one shares, if its state there is worth keeping; it then counts
        as a recent one itself.

        Args:
            after: ids whose state is there already.
        """
        if len(ids) < self.shortest:
            return None
        mine, shared = ids.numpy(force=True).astype(np.int32), 0
        for other in self._recent:
            size = min(len(mine), len(other))
            if size > shared and np.array_equal(mine[: shared + 1], other[: shared + 1]):
                differ = mine[:size] != other[:size]
                shared = max(shared, int(differ.argmax()) if differ.any() else size)
        self._recent.append(mine)
        while len(self._recent) > 1 and sum(map(len, self._recent)) > RECENT_IDS:
            self._recent.popleft()
        return shared if after + self.shortest <= shared < len(ids) else None

    def add(self, ids: Tensor, state: DecodeState, slot: int | None, logits: Tensor) -> None:
        """Keep a state that has read `ids` [N], and the logits [V] of what comes next.

        Args:
            slot: of which a copy is kept; None: the state is one, of one slot.
        """
        key = _key(ids)
        if len(ids) < self.shortest:
            return
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
            return
        try:
            prefix = Prefix(len(ids), state if slot is None else state.taken(slot), logits.clone())
        except torch.OutOfMemoryError:
            self.clear()
            return
        if prefix.num_bytes > self.max_bytes:
            return
        self._prefixes[key] = prefix
        self.num_bytes += prefix.num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._prefixes.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def clear(self) -> None:
        self._prefixes.clear()
        self._recent.clear()
        self.num_bytes = 0


def _key(ids: Tensor) -> bytes:
    return ids.numpy(force=True).astype(np.int32).tobytes()
