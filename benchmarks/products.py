"""Products of a few rows with a large matrix, as decoding needs them: against reading the matrix once, and the library.

    python benchmarks/products.py [--rows 1 16 64]

Each product has matrices enough that none is in the cache, captured in a CUDA graph with overlapped launches. Checked
first: each of a hundred runs gives the same numbers, near those of plain PyTorch.
"""

import argparse
import time
from collections.abc import Callable

import torch

from bytelatent.kernels import skinny_linear as products
from bytelatent.kernels.launch import overlapped

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


def measure(rows: int, N: int, K: int, gated: bool, rate: float) -> None:
    size = (2 if gated else 1) * N * K * 2
    matrices = [torch.randn((2 if gated else 1) * N, K, device="cuda", dtype=torch.bfloat16) * K**-0.5]
    matrices += [matrices[0].clone() for _ in range(min(max(8, 120_000_000 // size), 40) - 1)]
    x, residual = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for width in (K, N))

    def product(matrix: torch.Tensor) -> torch.Tensor:
        if gated:
            return products.skinny_linear(x, matrix, gated=True, eps=1e-5)
        return products.skinny_linear(x, matrix, eps=1e-5, residual_MN=residual)

    if gated:
        expected = products.plain_skinny_linear(x, matrices[0], gated=True, eps=1e-5)
    else:
        expected = products.plain_skinny_linear(x, matrices[0], eps=1e-5, residual_MN=residual)
    found = [product(matrices[0]) for _ in range(100)]
    far = max(float((one.float() - expected.float()).abs().max()) for one in found)
    alike = all(torch.equal(one, found[0]) for one in found)
    ours = microseconds([lambda matrix=matrix: product(matrix) for matrix in matrices])
    kept = products.LIBRARY_FROM
    products.LIBRARY_FROM = 0
    library = microseconds([lambda matrix=matrix: product(matrix) for matrix in matrices])
    products.LIBRARY_FROM = kept
    name = f"{rows} rows, {N} x {K}{' gated' if gated else ''}"
    print(
        f"{name}: {ours:.1f} us, reading takes {size / rate * 1e6:.1f}, the library with norm and gate {library:.1f}; "
    )
    print(f"    {far:.1e} from plain PyTorch, {'always the same' if alike else 'NOT ALWAYS THE SAME'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    given = parser.parse_args()
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds([lambda: target.copy_(source)] * 3)
    rate = 2 * len(source) / copy * 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s", flush=True)
    for rows in given.rows:
        for N, K, gated in SHAPES:
            measure(rows, N, K, gated, rate)


if __name__ == "__main__":
    main()
