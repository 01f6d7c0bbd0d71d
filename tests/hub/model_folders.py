"""A model to put on a hub, and what its download leaves."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bytelatent.errors import UserError
from bytelatent.hub import model_folder
from tests.hub_server import HubServer

NAME = "someone/blt-1b"
BIG = bytes(range(256)) * 4096  # 1 MiB
MODEL = {
    "config.json": b"{}",
    "README.md": b"the card",
    "LICENSE.txt": b"the licence",
    "original/USE_POLICY": b"the policy",
    "entropy_model/params.json": b"{ }",
    "model.safetensors": BIG,
    "entropy_model/model.safetensors": b"entropies",
}
WEIGHTS = ("model.safetensors", "entropy_model/model.safetensors")
OTHERS = {
    ".gitattributes": b"*",
    ".hidden/config.json": b"h",
    "consolidated.pth": b"pickle",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"import os",
    "picture.png": b"png",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def get(name: str = NAME, **options: Any) -> Path:
    return model_folder(name, console=Console(file=io.StringIO()), **options)


def told_by(name: str = NAME, **options: Any) -> list[str]:
    out = io.StringIO()
    model_folder(name, console=Console(file=out, width=80), **options)
    return out.getvalue().splitlines()


def error_of(name: str = NAME, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        get(name, **options)
    return str(caught.value)


def visible(folder: Path) -> dict[str, bytes]:
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    return {path: data for path, data in files.items() if not any(p.startswith(".") for p in Path(path).parts)}


def without_weights() -> dict[str, bytes]:
    return {path: data for path, data in MODEL.items() if path not in WEIGHTS}


def head(server: HubServer, name: str = NAME, branch: str = "main") -> str:
    return server.repositories["model", name].branches[branch]


def place(home: Path, name: str = NAME) -> Path:
    return home / "hub" / f"models--{name.replace('/', '--')}"


def files_asked_for(server: HubServer) -> dict[str, int]:
    return {what: number for what, number in server.requests.items() if not what.startswith("GET /api/")}
