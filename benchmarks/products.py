"""Products of a few rows with a large matrix, as decoding needs them: against reading the matrix once, and the library.

    python benchmarks/products.py [--rows 1 16 64] [--others] [--shapes 0 1 2]

Each product has matrices enough that none is in the cache, captured in a CUDA graph with overlapped launches. Checked
first: each of a hundred runs gives the same numbers, near those of plain PyTorch. As in a step, products back to a
model's width add to a residual and leave squares for a norm; the others norm the states, with squares that were left.
`sums` is the time where the kernel must sum the squares itself. Above 64 rows a step takes the library's product.
--others times other launches, too.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as product_of
from typing import Any

import torch

from bytelatent.kernels import skinny_linear as products
from bytelatent.kernels.launch import overlapped
from bytelatent.kernels.skinny_launch import PROGRAMS, SkinnyLaunch, launch_for
from bytelatent.kernels.skinny_linear import Squares

# Width of the result, of the states, whether it is gated: the byte LM's, the local models', the global transformer's
SHAPES = [(2304, 768, False), (768, 768, False), (2048, 768, True), (768, 2048, False)]
SHAPES += [(3072, 1024, False), (1024, 1024, False), (2816, 1024, True), (1024, 2816, False)]
SHAPES += [(6144, 2048, False), (2048, 2048, False), (5632, 2048, True), (2048, 5632, False)]


def microseconds(work: list[Callable[[], torch.Tensor]]) -> float:
    """Of one, when all follow one another in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), overlapped():
        for one in work:
            one()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for one in work:
                one()
        graph.replay()
        stream.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            graph.replay()
        stream.synchronize()
    return (time.perf_counter() - began) / 10 / len(work) * 1e6


@dataclass
class Product:
    """A product as a step has it, with many equal matrices."""

    rows: int
    N: int
    K: int
    gated: bool

    def __post_init__(self) -> None:
        self.size = (2 if self.gated else 1) * self.N * self.K * 2
        first = torch.randn(self.size // 2 // self.K, self.K, device="cuda", dtype=torch.bfloat16) * self.K**-0.5
        self.matrices = [first, *(first.clone() for _ in range(min(max(8, 120_000_000 // self.size), 40) - 1))]
        made = (torch.randn(self.rows, width, device="cuda", dtype=torch.bfloat16) for width in (self.K, self.N))
        self.x, self.residual = made
        self.adds = not self.gated and self.K >= self.N
        self.given: dict[str, Any] = {"residual_MN": self.residual} if self.adds else {"eps": 1e-5, "gated": self.gated}
        self.squares = Squares()
        if not self.adds and self.rows > 1:
            self.squares = Squares(self.x.float().square().unflatten(1, (-1, 64)).sum(2))

    def __call__(self, matrix: torch.Tensor, squares: Squares | None, **launch: Any) -> torch.Tensor:
        return products.skinny_linear(self.x, matrix, squares=squares, **self.given, **launch)

    def time(self, squares: Squares | None = None, **launch: Any) -> float:
        return microseconds([lambda matrix=matrix: self(matrix, squares, **launch) for matrix in self.matrices])


def measure(rows: int, N: int, K: int, gated: bool, rate: float) -> None:
    product = Product(rows, N, K, gated)
    expected = products.plain_skinny_linear(product.x, product.matrices[0], **product.given)
    found = [product(product.matrices[0], product.squares) for _ in range(100)]
    far = max(float((one.float() - expected.float()).abs().max()) for one in found)
    alike = all(torch.equal(one, found[0]) for one in found)
    launch = launch_for(rows, N, K, gated)
    ours, sums = product.time(product.squares, launch=launch), product.time(launch=launch)
    kept = products.LIBRARY_FROM
    products.LIBRARY_FROM = 0
    library = product.time()
    products.LIBRARY_FROM = kept
    name = f"{rows} rows, {N} x {K}{' gated' if gated else ' adds' if product.adds else ''}"
    print(f"{name}: {ours:.1f} us, {'leaving no squares' if product.adds else 'sums'} {sums:.1f}, ", end="")
    print(f"reading takes {product.size / rate * 1e6:.1f}, the library with norm and gate {library:.1f};")
    print(f"    {far:.1e} from plain PyTorch, {'always the same' if alike else 'NOT ALWAYS THE SAME'}", flush=True)


def others(rows: int, N: int, K: int, gated: bool) -> list[SkinnyLaunch]:
    """Launches in place of the one in use, that fit shared memory and share widths as far as that is possible."""
    found = []
    for block_m, block_n, splits in product_of((16, 32, 64), (32, 64), (1, 2, 4)):
        block_k, tiles = 128 if splits > 1 else 64, -(-rows // block_m) * -(-N // block_n) * splits
        if block_m > max(rows, 32) or splits * block_k > K or (splits > 1 and (gated or tiles > PROGRAMS)):
            continue
        stage = (block_m + block_n * (1 + gated)) * block_k * 2
        stages = min(220_000 // stage, -(-K // (splits * block_k)), 8)
        found.append(SkinnyLaunch(block_m, block_n, block_k, num_warps=4, num_stages=stages, splits=splits))
    return found


def measure_others(rows: int, N: int, K: int, gated: bool) -> None:
    product = Product(rows, N, K, gated)
    used = launch_for(rows, N, K, gated)
    times = [(product.time(product.squares, launch=launch), launch) for launch in [used, *others(rows, N, K, gated)]]
    print(f"{rows} rows, {N} x {K}{' gated' if gated else ''}: in use {times[0][0]:.1f} us, {used}")
    for took, launch in sorted(times, key=lambda pair: pair[0])[:4]:
        print(f"    {took:.1f} us: {launch}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="which, by number")
    parser.add_argument("--others", action="store_true")
    given = parser.parse_args()
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds([lambda: target.copy_(source)] * 3)
    rate = 2 * len(source) / copy * 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s", flush=True)
    for rows in given.rows:
        for N, K, gated in (SHAPES[number] for number in given.shapes):
            measure(rows, N, K, gated, rate)
            if given.others and rows > 1:
                measure_others(rows, N, K, gated)


if __name__ == "__main__":
    main()
