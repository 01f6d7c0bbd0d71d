"""Folders as Meta published them, made of the goldens."""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

Format = Literal["hub", "older"]
FILES = ("config.json", "train_args.json", "model.safetensors")


def write_published(golden: Path, folder: Path, format: Format = "hub") -> Path:
    """Put a golden model into a folder, in either of Meta's formats."""
    folder.mkdir(parents=True)
    if format == "hub":
        for name in FILES:
            if (golden / name).is_file():
                shutil.copyfile(golden / name, folder / name)
        return folder
    args = json.loads((golden / "config.json").read_text())["args"]
    if (golden / "train_args.json").is_file():
        data = json.loads((golden / "train_args.json").read_text())["data"]
        params = {"name": "blt", "model": args, "entropy_model": None, "data": data, "distributed": {"dp_shard": 8}}
    else:
        window = args.pop("sliding_window")
        assert window == 512  # which the older file does not say
        params = {"name": "entropy", "entropy_model": args, "data": None}
    (folder / "params.json").write_text(json.dumps(params))
    torch.save({"model": load_file(golden / "model.safetensors")}, folder / "consolidated.pth")
    return folder
