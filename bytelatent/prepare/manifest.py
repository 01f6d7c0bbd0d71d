"""The last of all files: what a prepared folder holds, and where it came from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.prepare.disk import write_text, writing
from bytelatent.prepare.gather import range_parts
from bytelatent.prepare.work import FORMAT, Work
from bytelatent.text import MAX_ROW_BYTES

MANIFEST = "manifest.json"
READ_BYTES = 1 << 22


def finish(work: Work) -> None:
    """Give the output files their names, and write the manifest.

    Raises:
        UserError: a part of the second pass is missing.
    """
    cut = json.loads(work.cut_file.read_text(encoding="utf-8"))
    parts: list[list[Any]] = [[] for _ in cut["outputs"]]
    for number in range(len(cut["ranges"])):
        done = range_parts(work, number)
        if done is None:
            raise UserError(f"--out: part {number} of the second pass is not there; give the same command again")
        for output, size, digest in done:
            parts[output].append([size, digest])
    with writing(work.out):
        for output, its_parts in zip(cut["outputs"], parts, strict=True):
            assert sum(size for size, _ in its_parts) == output["end"] - output["begin"]
            if (work.aside / output["name"]).exists():
                os.replace(work.aside / output["name"], work.out / output["name"])
        write_text(work.out / MANIFEST, json.dumps(masked(_manifest(work, cut, parts)), indent=1))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder; None if there is none.

    Raises:
        UserError: it cannot be read, or is of another program.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = isinstance(manifest, dict) and {"request", "outputs", "inputs"} <= manifest.keys()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        known, manifest = False, {}
    if not known:
        raise UserError(f"--out: '{folder / MANIFEST}' is damaged or of another program; give another folder")
    request = manifest["request"]
    if "max_corrupt" in request:  # as of earlier versions
        request["max_bad_rows"] = request.pop("max_corrupt")
    request.setdefault("max_row_bytes", MAX_ROW_BYTES)
    manifest.setdefault("unread", {})
    return manifest


def verify(folder: str | Path) -> list[str]:
    """Read a prepared folder again, and name what is not as its manifest says: one line each, none if all is well.

    Raises:
        UserError: the folder is not one that was prepared.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"'{folder}' has no {MANIFEST}; it was not prepared to the end")
    return [wrong for output in manifest["outputs"] if (wrong := _what_is_wrong(folder / output["name"], output))]


def _what_is_wrong(path: Path, output: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != output["bytes"]:
            return f"{path.name} has {size:,} bytes, not {output['bytes']:,}"
        with path.open("rb") as file:
            for part_size, digest in output["parts"]:
                begin = file.tell()
                if _digest(file, part_size) != digest:
                    return f"{path.name} is not as it was written, between bytes {begin:,} and {begin + part_size:,}"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    return None


def _digest(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size and (data := file.read(min(READ_BYTES, size))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


def _manifest(work: Work, cut: dict[str, Any], parts: list[list[Any]]) -> dict[str, Any]:
    plan = work.plan
    return {
        "format": FORMAT,
        "request": plan.request,
        "memory": plan.memory,
        "inputs": [{"file": file.path, "bytes": file.size, "changed": file.changed} for file in plan.files],
        "documents_read": cut["documents_read"],
        "bytes_read": cut["bytes_read"],
        "documents": cut["documents"],
        "bytes": cut["bytes"],
        "duplicates": cut["documents_read"] - cut["documents"],
        "corrupt": {"rows": len(cut["corrupt"]), "places": cut["corrupt"]},
        "unread": cut["unread"],
        "outputs": [
            {
                "name": output["name"],
                "documents": output["documents"],
                "bytes": output["end"] - output["begin"],
                "parts": its_parts,  # [bytes, sha256] in order
            }
            for output, its_parts in zip(cut["outputs"], parts, strict=True)
        ],
    }
