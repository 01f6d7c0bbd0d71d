"""How fast a BLT is adapted: all its weights by `blt train`, or PEFT's adapters in transformers' Trainer.

    python benchmarks/lora.py                                   # a few million parameters, on this machine
    python benchmarks/lora.py --preset blt-1b --context 4096 --batch 4 --dtype bfloat16 --rounds 1

All read the same bytes in a step: rows of `--context` ids. `blt train` with all but the byte embedding frozen computes
no gradients of matrices, as with adapters, and none of adapters: the most that adapters there could reach. Patches
begin at spaces, so that no byte LM runs. The ways take turns; a step's time is the median over all rounds, of the
CPU's own clock (one thread) where there is no GPU, so that other programs on the machine count little. Needs
`bytelatent[transformers]`.
"""

import argparse
import itertools
import json
import logging
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bytelatent.log import configure
from bytelatent.model import BLTSettings, build_model, preset
from bytelatent.model.settings import CrossAttentionSettings, NgramHashSettings, StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.training import TrainSettings, train
from bytelatent.training import trainer as loop
from bytelatent.weights import Config, save

WARM_UP = 3  # steps that do not count
REST = ("hash_tables", "encoder", "global_transformer", "decoder")
TARGETS = ["query", "key", "value", "output", "gate", "up", "down"]
LOCAL = StackSettings(dim=192, num_layers=2, num_heads=6, window=256, multiple_of=64)
SMALL = BLTSettings(
    encoder=LOCAL.model_copy(update={"num_layers": 1}),
    global_transformer=StackSettings(dim=384, num_layers=4, num_heads=6, multiple_of=64),
    decoder=LOCAL,
    cross_attention=CrossAttentionSettings(k=2, num_heads=6),
    ngram_hash=NgramHashSettings(vocab_size=2003),
)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def ours(source: Path, text: Path, args: argparse.Namespace, frozen: tuple[str, ...] = ()) -> list[float]:
    """Seconds of each step of `blt train`."""
    values: dict[str, Any] = {
        "run": tempfile.mkdtemp(dir=source.parent),
        "init": str(source),
        "steps": args.steps,
        "data": {"train": str(text), "context": args.context, "batch_bytes": args.batch * args.context},
        "optimizer": {"lr": 1e-4, "warmup_steps": 0, "lr_scale": dict.fromkeys(frozen, 0.0)},
        "checkpoint": {"last": "weights"},
        "dtype": args.dtype,
    }
    ends: list[float] = []
    step = loop.Trainer.train_step

    def timed(self: loop.Trainer) -> dict[str, Any]:
        row = step(self)
        ends.append(clock())
        return row

    loop.Trainer.train_step = timed  # type: ignore[method-assign]
    try:
        train(TrainSettings.parse(values))
    finally:
        loop.Trainer.train_step = step  # type: ignore[method-assign]
    return [late - early for early, late in itertools.pairwise(ends)]


def peft(source: Path, text: Path, args: argparse.Namespace) -> list[float]:
    """Seconds of each step of PEFT's adapters in transformers' Trainer."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    import bytelatent.hf

    model = AutoModelForCausalLM.from_pretrained(source)
    config = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS)
    tokenizer = bytelatent.hf.BytelatentTokenizer(add_eos_token=True)
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    data = Dataset.from_dict({"input_ids": [tokenizer(row)["input_ids"][: args.context] for row in rows]})
    ends: list[float] = []

    class Timer(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

    Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(dir=source.parent),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-4,
            bf16=args.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[Timer()],
    ).train()
    return [late - early for early, late in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="a preset of `blt info`; default: a few million parameters")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    configure(logging.WARNING)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, text = Path(folder) / "source", Path(folder) / "text.jsonl"
        settings = preset(args.preset) if args.preset else SMALL
        source.mkdir()
        model = build_model(settings)
        save(source, model, Config(model=settings, context=args.context, patching=PatchSettings(mode="space")))
        written = b"".join(
            path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
        )
        pieces = [
            written[at : at + args.context - 1].decode("latin-1").encode("ascii", "replace")
            for at in range(0, len(written), args.context - 1)
        ]
        text.write_text("".join(json.dumps({"text": piece.decode()}) + "\n" for piece in pieces))
        ways: dict[str, Callable[[], list[float]]] = {
            "blt train, all weights": lambda: ours(source, text, args),
            "blt train, all but one frozen": lambda: ours(source, text, args, REST),
            "transformers' Trainer, LoRA": lambda: peft(source, text, args),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                times[name] += way()[WARM_UP:]
        number = sum(weight.numel() for weight in model.parameters())
        unit = "second" if torch.cuda.is_available() else "second of one core"
        print(f"{number:,} parameters, {args.dtype}, {args.batch} x {args.context} ids a step, bytes per {unit}:")
        first = None
        for name, found in times.items():
            rate = args.batch * args.context / statistics.median(found)
            first = first or rate
            print(f"{name:<28} {rate:>12,.0f}  {rate / first:.2f}")


if __name__ == "__main__":
    main()
