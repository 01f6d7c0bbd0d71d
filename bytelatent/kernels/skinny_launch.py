"""How products of a few rows are cut into programs."""

from dataclasses import dataclass

from bytelatent.kernels.launch import power_of_two

# Shapes: M rows, at most a few hundred, K width of the states, N width of the result

PROGRAMS = 132  # that run at once on the GPU that the launches are chosen for


@dataclass(frozen=True)
class SkinnyLaunch:
    """How a product is cut into programs.

    Attributes:
        block_m: rows a program; 1: multiply and sum, else tensor cores and a power of two from 16 on.
        block_n: columns of the result a program, a power of two; from 16 on with tensor cores.
        block_k: how much of the width is read at once, a power of two; from 16 on with tensor cores.
        num_stages: how many such parts of the width are loaded at once.
        splits: programs that share the width; only with tensor cores. The last of them to finish adds up what they
            found, always in the same order.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def launch_for(M: int, N: int, K: int, gated: bool = False, itemsize: int = 2) -> SkinnyLaunch:
    """The launch for M rows, N columns of the result and a width of K, of a matrix of `itemsize` bytes a number."""
    if M == 1:
        if gated or (K >= 2048 and N <= 2048):
            block_n = 4 if not gated and N * K > 2**23 else 2
            return SkinnyLaunch(1, block_n, min(power_of_two(K), 1024), num_warps=4, num_stages=8)
        block_n = next((size for size in (8, 4) if size * PROGRAMS <= N), 2)
        # At 256 a warp has its own rows of the matrix, and no warp waits for another.
        return SkinnyLaunch(1, block_n, min(power_of_two(K), 256), num_warps=min(block_n, 4), num_stages=8)
    # 64 rows of the matrix are what Hopper's tensor cores take from shared memory at once.
    block_m, block_n, block_k = (min(max(power_of_two(size), 16), 64) for size in (M, N, K))
    if gated and N <= 64 * PROGRAMS // 2:
        block_n = min(block_n, 32)  # of either matrix
    tiles, splits = -(-M // block_m) * -(-N // block_n), 1
    while not gated and splits < 4 and tiles * splits * 2 <= PROGRAMS and splits * 2 * 512 <= K:
        splits *= 2
    if splits > 1:
        block_k = 128
    num_stages = 2 if itemsize >= 4 else 4 if splits > 1 else 5 if gated else 8
    return SkinnyLaunch(block_m, block_n, block_k, num_warps=4, num_stages=num_stages, splits=splits)
