"""Without a package that an extra brings, commands end on one line that names the extra, and leave nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES: dict[str, tuple[str, str, str]] = {  # what is missing, its extra, the command
    "prepare": ("pyarrow", "data", "prepare ../text --out out"),
    "prepare ray": ("datatrove", "data", "prepare ../text --out out --executor ray"),
    "prepare hub": ("huggingface_hub", "data", "prepare fineweb_edu_10bt --out out"),
    "train hf": ("huggingface_hub", "data", "train config=debug run=out data.train=hf://x/y"),
    "train http": ("aiohttp", "data", "train config=debug run=out data.train=http://127.0.0.1:9/x.jsonl"),
    "train parquet": ("pyarrow", "data", "train config=debug run=out data.train=../text/a.parquet"),
    "eval hf": ("huggingface_hub", "data", "eval hf://x/y -m tiny"),
    "tokenizer parquet": ("pyarrow", "data", "tokenizer ../text/a.parquet --out out"),
    "tokenizer": ("tokenizers", "hf", "tokenizer ../text/a.jsonl --out out"),
    "entropies": ("pyarrow", "data", "entropies ../text/a.jsonl -m ../tiny/byte_lm --out out"),
    "calibrate": ("pyarrow", "data", "calibrate ../text/a.parquet"),
    "demo": ("pyarrow", "data", "demo --out out --minutes 0.1 --text ../text/a.parquet"),
    "plot": ("pyarrow", "data", "plot patches ../tiny ../text/a.parquet --out out.png"),
    "patch": ("tokenizers", "hf", "patch abc --mode bpe:file.json"),
    "generate": ("llguidance", "serve", "generate abc -m tiny --regex a"),
    "generate hub": ("huggingface_hub", "hf", "generate abc -m owner/name"),
    "convert": ("huggingface_hub", "hf", "convert owner/name out"),
    "info": ("huggingface_hub", "hf", "info owner/name"),
    "byteify": ("huggingface_hub", "hf", "byteify owner/name --out out"),
    "tasks": ("lm_eval", "eval", "eval --tasks arc_easy -m tiny"),
    "serve 1": ("fastapi", "serve", "serve tiny --port 0"),
    "serve 2": ("uvicorn", "serve", "serve tiny --port 0"),
    "serve 3": ("starlette", "serve", "serve tiny --port 0"),
    "serve 4": ("prometheus_client", "serve", "serve tiny --port 0"),
    "track": ("wandb", "track", "train config=debug run=out data.train=../text/a.jsonl track=[wandb]"),
}
# One process imports what all of them need, and a child of it runs each.
PROGRAM = """
import gc
gc.disable()
import json, os, sys, traceback
from importlib.abc import MetaPathFinder
import torch, typer
from bytelatent.cli import app
import bytelatent.training, bytelatent.blt
from bytelatent.errors import guarded

class Without(MetaPathFinder):
    def __init__(self, package):
        self.package = package
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

gc.freeze()  # what is imported is no garbage
gc.enable()
for name, (package, _, command) in json.load(sys.stdin).items():
    os.mkdir(name)
    child = os.fork()
    if child == 0:
        os.chdir(name)
        os.dup2(os.open(f"../{name}.log", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        loaded = [module for module in sys.modules if module.partition(".")[0] == package]
        print(f"loaded without need: {loaded}" if loaded else "", flush=True)
        sys.meta_path.insert(0, Without(package))
        code = 70
        try:
            guarded(lambda: app(command.split(), standalone_mode=False))
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sorted(os.listdir(name))]), flush=True)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """The exit code of each command, what it wrote, and what it left."""
    folder = tmp_path_factory.mktemp("missing")
    (folder / "text").mkdir()
    (folder / "text" / "a.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    (folder / "text" / "a.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    (folder / "tiny").symlink_to(ROOT / "bytelatent" / "tiny")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(CASES),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name, code, left in map(json.loads, done.stdout.splitlines()):
        found[name] = code, (folder / f"{name}.log").read_text(), left
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_extra(name: str, ended: dict[str, tuple[int, str, list[str]]]) -> None:
    package, extra, command = CASES[name]
    code, shown, left = ended[name]
    assert code == 2, shown
    assert "Traceback" not in shown
    assert "loaded without need" not in shown
    last = shown.rstrip().splitlines()[-1]
    assert package in last
    assert f"pip install 'bytelatent[{extra}]'" in last
    assert left == [] or command.startswith("train")  # a run keeps its lock and log, as after any error
