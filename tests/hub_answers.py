"""What the hub of `hub_server` says about files, and what it reads in a client's uploads."""

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.hub_server import HubRepository, StoredFile


def upload_modes(body: str) -> dict[str, Any]:
    """How files should be uploaded: all of them within the commit."""
    paths = [file["path"] for file in json.loads(body)["files"]]
    return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}


def uploaded(body: str) -> dict[str, bytes]:
    """The files of a commit."""
    lines = [json.loads(line) for line in body.splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


def entries_of(files: dict[str, "StoredFile"], repository: "HubRepository") -> dict[str, dict[str, Any]]:
    """Files and folders by path, as the API lists them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        for folder in list(Path(path).parents)[-2::-1]:
            oid = hashlib.sha1(str(folder).encode()).hexdigest()
            entries[str(folder)] = {"type": "directory", "path": str(folder), "oid": oid, "size": 0}
        size = repository.listed_sizes.get(path, len(file.data))
        large = {"oid": file.sha256, "size": size, "pointerSize": 134}
        entries[path] = {
            "type": "file",
            "path": path,
            "oid": hashlib.sha1(file.sha256.encode()).hexdigest(),
            "size": size,
            "lfs": large,
        }
    return entries
