"""Is a byteified token LM better than a BLT from scratch on the same bytes? The experiment for one GPU.

    python benchmarks/byteify_card.py text --out runs/byteify_card
    python benchmarks/byteify_card.py --tiny --out /tmp/byteify_card

`text` is a folder with train.jsonl and valid.jsonl. In this order, all by commands of `blt`:

1. token     a token LM of about 110 million parameters is trained for --minutes, and written as LlamaForCausalLM
2. byteified that folder is byteified, and the BLT trained on --share of the bytes that the token LM has read, its
             global transformer at --global-rate of the learning rate
3. scratch   a BLT of the same shape is trained on the same bytes from random weights

A call takes --call-minutes at most: it then stops its training, which writes a checkpoint, and the same command
continues. What is done is not done again. `OUT/rows.jsonl` has a row for each model once it is measured: held-out bits
per byte, bytes read, seconds of training, parameters. --tiny is the same with small models, on text that Python brings,
in a few minutes on two CPU cores; it says nothing about large ones.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelatent.config import find_config, laid_over, load_yaml, to_yaml
from bytelatent.weights import open_pretrained
from bytelatent.weights.stored_model import num_parameters

UNFINISHED = 3  # exit code


@dataclass
class Card:
    given: argparse.Namespace
    until: float  # when this call must end, by time.monotonic

    @property
    def out(self) -> Path:
        return self.given.out

    def run(self) -> None:
        tokenizer, llama, start = self.out / "tokenizer.json", self.out / "token-hf", self.out / "byteified-new"
        token = self.out / "token"
        if not tokenizer.is_file():
            self.blt("tokenizer", self.text("train"), "--vocab", 512 if self.given.tiny else 16_384, "--out", tokenizer)
        size = "demo_token_lm" if self.given.tiny else "token_lm_100m"
        minutes = f"minutes={self.given.minutes}"
        self.blt("train", f"config={size}", *self.data(), f"run={token}", f"data.tokenizer={tokenizer}", minutes)
        if not llama.is_dir():
            self.blt("convert", token, llama, "--to", "hf")
        self.measure("token LM", token)
        if not start.is_dir():
            local = ["--local-dim", "64", "--decoder-layers", "2"] if self.given.tiny else []
            self.blt("byteify", llama, "--out", start, *local)
        rate = {"lr_scale": {"global_transformer": self.given.global_rate}}
        self.train_blt("byteified", {"init": str(start)}, rate)
        shape = open_pretrained(start, weights=False).config
        self.train_blt("scratch", {"model": shape.model.plain(), "patching": shape.plain()["patching"]}, {})

    def train_blt(self, name: str, own: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """A BLT on a share of the bytes of the token LM, all but its beginning as a configuration of the package."""
        common = load_yaml(find_config("demo_blt_space" if self.given.tiny else "blt_space_100m"))
        data = {**common["data"], "train": self.text("train"), "valid": self.text("valid")}
        steps = max(int(self.given.share * metrics(self.out / "token")[-1]["bytes_seen"] / data["batch_bytes"]), 1)
        left_out = ("model", "patching", "minutes")
        settings = {key: value for key, value in common.items() if key not in left_out} | own
        optimizer = laid_over(common["optimizer"], optimizer)
        settings |= {"data": data, "optimizer": optimizer, "run": str(self.out / name), "steps": steps}
        config = self.out / f"{name}.yaml"
        config.write_text(to_yaml(settings))
        self.blt("train", f"config={config}")
        self.measure(name, self.out / name)

    def measure(self, name: str, run: Path) -> None:
        rows = self.out / "rows.jsonl"
        if rows.is_file() and any(json.loads(line)["model"] == name for line in rows.read_text().splitlines()):
            return
        limit = 20_000 if self.given.tiny else 5_000_000
        found = json.loads(self.blt("eval", self.text("valid"), "--model", run, "--max-bytes", limit, "--json"))
        last = metrics(run)[-1]
        row = {
            "model": name,
            "bits_per_byte": found["bits_per_byte"],
            "bytes_read": last["bytes_seen"],
            "steps": last["step"],
            "seconds": round(last["seconds"]),
            "parameters": num_parameters(open_pretrained(run, weights=False).config.model),
        }
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def text(self, part: str) -> str:
        if self.given.text is not None:
            return str(self.given.text / f"{part}.jsonl")
        return f"{sysconfig.get_paths()['stdlib']}/{'*.py' if part == 'train' else 'json/*.py'}"

    def data(self) -> list[str]:
        return [f"data.{part}={self.text(part)}" for part in ("train", "valid")]

    def blt(self, *arguments: Any) -> str:
        """Run a command, and return what it prints; at the end of the call's time ask it to stop, and exit."""
        command = [sys.executable, "-m", "bytelatent", *map(str, arguments)]
        print("blt", *arguments, file=sys.stderr, flush=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                printed, _ = process.communicate(timeout=max(self.until - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                process.terminate()
                process.communicate()
                print("the call's time is over; the same command continues", file=sys.stderr)
                sys.exit(UNFINISHED)
        if process.returncode:
            sys.exit(process.returncode)
        return printed


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "seconds" in row]  # of training; others are of validation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="training of the token LM; default 10, of --tiny 0.5")
    parser.add_argument("--share", type=float, default=0.2, help="of the token LM's bytes, for each BLT")
    parser.add_argument("--global-rate", type=float, default=0.1)
    parser.add_argument("--call-minutes", type=float, default=9.0)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.text is None and not given.tiny:
        parser.error("name a folder with train.jsonl and valid.jsonl, or --tiny")
    given.minutes = given.minutes or (0.5 if given.tiny else 10.0)
    given.out.mkdir(parents=True, exist_ok=True)
    Card(given, time.monotonic() + 60 * given.call_minutes).run()


if __name__ == "__main__":
    main()
