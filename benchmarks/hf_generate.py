"""How fast does `generate` of the class in transformers run? Against our engine, with the same model and prompts.

    python benchmarks/hf_generate.py                        # blt-1b in bfloat16, on a card
    python benchmarks/hf_generate.py --preset demo-blt --dtype float32 --counts 1,4 --new 64

A model with random weights, whose patches are those of `benchmarks/decode.py`, is written to a folder and loaded by
`AutoModelForCausalLM.from_pretrained`. Prompts of 512 random bytes; new bytes are drawn at temperature 1, and no text
ends before its length. Times are of whole calls, with reading the prompts, after a short call that warms up. Greedy
texts of both ways must be equal. Needs `bytelatent[transformers]`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from bytelatent import BLT
from bytelatent.device import choose_device
from bytelatent.inference import Engine, Sampling
from bytelatent.inference.step import sampling
from bytelatent.model import build_model, preset
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config

PROMPT = 512


def new_model(name: str, dtype: torch.dtype) -> BLT:
    if torch.cuda.is_available():
        import decode_models  # beside this file

        decoder: Any = decode_models.decoder_of(name)
        return BLT(decoder.model, Config(model=preset(name), context=8192, patching=decoder.patching), decoder.byte_lm)
    torch.manual_seed(0)
    config = Config(model=preset(name), context=8192, patching=PatchSettings(mode="space"))
    model: Any = build_model(preset(name))
    return BLT(model.to(dtype), config, None)


def seconds_of(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="blt-1b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--counts", default="1,64", help="sequences at once")
    parser.add_argument("--new", type=int, default=512)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    import bytelatent.hf

    _ = bytelatent.hf  # registers the class
    sampling.EOS = -1  # no text ends
    device = choose_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        new_model(args.preset, getattr(torch, args.dtype)).save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, args.dtype), device_map=str(device)
        )
    blt = model.blt
    print(f"{args.preset}, {args.dtype}, {args.new} new bytes after {PROMPT}; {torch.__version__}, transformers' class")
    generator = torch.Generator().manual_seed(0)
    for count in (int(part) for part in args.counts.split(",")):
        text = torch.randint(4, 260, [count, PROMPT], generator=generator)
        prompts = torch.cat([torch.ones(count, 1, dtype=torch.long), text], 1).to(device)

        def theirs(new: int, draws: bool = True, prompts: torch.Tensor = prompts) -> torch.Tensor:
            return model.generate(prompts, max_new_tokens=new, do_sample=draws, top_k=0)[:, PROMPT + 1 :]

        engine = blt.engine(count)

        def ours(
            new: int, draws: bool = True, prompts: torch.Tensor = prompts, engine: Engine = engine
        ) -> torch.Tensor:
            asked = [
                engine.submit(row, Sampling(temperature=float(draws), seed=number), new)[0]
                for number, row in enumerate(prompts.cpu())
            ]
            engine.run()
            return torch.tensor([one.ids for one in asked])

        same = bool((theirs(48, False).cpu() == ours(48, False)).all())
        for name, way in (("generate", theirs), ("engine", ours)):
            way(24)
            times = [seconds_of(lambda way=way: way(args.new)) for _ in range(3)]
            print(
                f"{count} sequences, {name}: {count * args.new / min(times):,.0f} bytes/s "
                f"(three calls: {', '.join(f'{count * args.new / each:,.0f}' for each in times)})",
                flush=True,
            )
        print(f"{count} sequences: greedy texts equal: {same}", flush=True)


if __name__ == "__main__":
    main()
