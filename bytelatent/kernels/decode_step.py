"""The decisions of a decoding step, for all rows: what is drawn, whether a patch closes, which rows go on.

They are little arithmetic in many small operations, each of which would be a kernel of its own. Here they are four.
The plain forms are in `bytelatent.inference.step.plain`: they are made of sampling and rules, which stand above.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels.overlap import launch_options

# Shapes: B rows, C places for rows whose patch closes, V vocabulary, W ids of a tail, K keys a patch, Y
# cross-attentions, H heads, E head size

EOS, OFFSET = 2, 4  # as in `bytelatent.vocab`, which stands on the same floor
MODES = ("entropy", "rise", "combined", "space", "static", "byte")


@dataclass
class Flags:
    """What a step decides, for each row."""

    is_active: Tensor  # [B] bool, whether a sequence is in the row
    is_waiting: Tensor  # [B] bool, whether its closed patch waits for the global transformer
    drawn: Tensor  # [B] the id that was drawn, -1: none
    log_probability: Tensor  # [B] float32 of it
    ids: Tensor  # [B] the id to read, any where none is read
    reads: Tensor  # [B] bool, whether an id is read
    row: Tensor  # [B] the row itself, -1 where no id is read
    at: Tensor  # [B] position of the newest id, that to read included
    count: Tensor  # [B] bytes in the open patch before this one, -1 where no id is read
    wants: Tensor  # [B] bool, whether a closed patch is there
    closing: Tensor  # [C] rows for which the global transformer runs, -1: none
    number: Tensor  # [C] the number of the patch that each of them closes
    closing_count: Tensor  # [C] bytes in that patch
    run: Tensor  # [1] whether there is any of them
    goes_on: Tensor  # [B] the row itself, -1 where no logits are to come any more in this step
    reads_patch: Tensor  # [B] bool, whether a patch is closed yet

    @classmethod
    def empty(cls, num_rows: int, places: int, device: torch.device | str) -> "Flags":
        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        sizes = {"closing": places, "number": places, "closing_count": places, "run": 1}
        dtypes = dict.fromkeys(("is_active", "is_waiting", "reads", "wants", "reads_patch"), torch.bool)
        dtypes |= {"log_probability": torch.float32, "run": torch.int32}
        names = [field.name for field in fields(cls)]
        return cls(**{name: zeros(sizes.get(name, num_rows), dtypes.get(name, torch.long)) for name in names})


@dataclass(frozen=True)
class Rule:
    """A patching rule as the kernel takes it."""

    mode: str  # one of MODES
    threshold: float = 0.0
    threshold_add: float = 0.0
    patch_size: int = 1
    max_patch_length: int = 0  # 0: none

    @classmethod
    def of(cls, patching: Any) -> "Rule":
        """Of `PatchSettings`, but not `bpe`."""
        mode = patching.mode
        if mode == "entropy" and patching.monotonicity:
            mode = "rise"
        elif mode == "entropy" and patching.threshold_add is not None:
            mode = "combined"
        assert mode in MODES, f"the rule '{mode}' is not decided on the device"
        return cls(
            mode,
            patching.threshold or 0.0,
            patching.threshold_add or 0.0,
            patching.patch_size or 1,
            patching.max_patch_length or 0,
        )


def draw(logits_BV: Tensor, rows: Any, position: Tensor, flags: Flags, expected: Tensor | None = None) -> None:
    """Draw an id in each active row that does not wait, and note it.

    Equals `SamplingSlots.draw` and `read`; a row ends with EOS, or once as many ids were drawn as were asked for.

    Args:
        logits_BV: float32, of what comes next.
        rows: `SamplingSlots`.
        position: [B] ids read.
        flags: `is_active`, `is_waiting` are read; `is_active`, `drawn`, `log_probability`, `ids`, `reads`, `row` and
            `at` are written.
        expected: [B] the only ids that are drawn: a row that would draw another one draws none, and waits.
    """
    from bytelatent.kernels import decode_step_triton

    kernels: Any = decode_step_triton
    assert logits_BV.is_contiguous(), "logits are not contiguous"
    kernels.draw_kernel[(logits_BV.shape[0],)](
        logits_BV,
        *(rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.repetition_penalty, rows.seed, rows.drawn),
        *(rows.seen, rows.valid_utf8, rows.utf8, rows.remaining, rows.utf8_after, rows.needed, rows.needed_after),
        *(position, expected, flags.is_active, flags.is_waiting),
        *(flags.drawn, flags.log_probability, flags.ids, flags.reads, flags.row, flags.at),
        V=logits_BV.shape[1],
        PADDED=_power_of_two(logits_BV.shape[1]),
        EOS=EOS,
        OFFSET=OFFSET,
        num_warps=4,
        **launch_options(),
    )


def append(state: Any, flags: Flags) -> None:
    """Put the ids that are read to those that were, and into the open patches.

    Args:
        state: `FastState`: `position`, `tail` and `open_count` are written.
        flags: `reads` and `ids` are read; `count` and `reads_patch` are written.
    """
    from bytelatent.kernels import decode_step_triton

    kernels: Any = decode_step_triton
    kernels.append_kernel[(len(flags.ids),)](
        *(state.position, state.tail, state.open_count, state.num_patches),
        *(flags.reads, flags.ids, flags.count, flags.reads_patch),
        W=state.tail.shape[1],
        PADDED_W=_power_of_two(state.tail.shape[1]),
        num_warps=1,
        **launch_options(),
    )


def decide(lm_logits_BV: Tensor | None, patching: Any, state: Any, flags: Flags) -> None:
    """Whether what comes after the ids that were read starts a patch. They are appended before.

    Equals `bytelatent.patching.step`.

    Args:
        lm_logits_BV: the byte LM's, float32, where the rule asks it.
        patching: `PatchSettings`, but not `bpe`.
        state: `FastState`: `position` and `tail` (two ids and more) are read, `previous_entropy` and `since_start`
            written.
        flags: `reads`, `ids`, `is_waiting` are read; `wants` is written.
    """
    from bytelatent.kernels import decode_step_triton

    kernels: Any = decode_step_triton
    rule = Rule.of(patching)
    kernels.decide_kernel[(len(flags.ids),)](
        lm_logits_BV,
        *(state.position, state.tail, state.previous_entropy, state.since_start),
        *(flags.reads, flags.ids, flags.is_waiting, flags.wants),
        *(rule.threshold, rule.threshold_add),
        MODE=MODES.index(rule.mode),
        PATCH_SIZE=rule.patch_size,
        MOST=rule.max_patch_length,
        V=1 if lm_logits_BV is None else lm_logits_BV.shape[1],
        PADDED=1 if lm_logits_BV is None else _power_of_two(lm_logits_BV.shape[1]),
        W=state.tail.shape[1],
        OFFSET=OFFSET,
        num_warps=2,
        **launch_options(),
    )


def choose(state: Any, flags: Flags, quorum: float, decoded: bool) -> None:
    """Give the rows that want the global transformer the places there are, those that have waited first.

    Args:
        state: `FastState`: `num_patches` and `open_count` are written.
        flags: `wants`, `is_waiting`, `reads` are read; `closing`, `number`, `closing_count`, `run`, `goes_on`,
            `reads_patch` and `is_waiting` are written.
        quorum: the share of the rows that read or wait that must want it; of fewer all wait on.
        decoded: whether the rows that want nothing have their logits already.
    """
    from bytelatent.kernels import decode_step_triton

    kernels: Any = decode_step_triton
    rows, places = len(flags.wants), len(flags.closing)
    kernels.choose_kernel[(1,)](
        *(state.num_patches, state.open_count, flags.wants, flags.is_waiting, flags.reads),
        *(flags.closing, flags.number, flags.closing_count, flags.run, flags.goes_on, flags.reads_patch),
        quorum,
        B=rows,
        PADDED_B=_power_of_two(rows),
        C=places,
        PADDED_C=_power_of_two(places),
        DECODED=decoded,
        num_warps=1 if rows == 1 else 4,
        **launch_options(),
    )


def keep_patch(kv: Tensor, patch_k: Tensor, patch_v: Tensor, closing: Tensor) -> None:
    """Let rows read the patch that they have closed.

    Args:
        kv: [C*K, Y*2*H*E] for each cross-attention the keys, then the values, of the patches; contiguous.
        patch_k, patch_v: [Y, B, K, H, E], written where `closing` [C] names a row.
    """
    from bytelatent.kernels import decode_step_triton

    kernels: Any = decode_step_triton
    layers, rows, keys, heads, size = patch_k.shape
    assert kv.shape == (len(closing) * keys, layers * 2 * heads * size), f"kv: {tuple(kv.shape)}"
    assert kv.is_contiguous()
    width = heads * size
    kernels.keep_patch_kernel[(len(closing) * keys, layers)](
        *(kv, patch_k, patch_v, closing),
        B=rows,
        K=keys,
        Y=layers,
        WIDTH=width,
        PADDED=_power_of_two(width),
        num_warps=4,
        **launch_options(),
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
