"""Build what the Dockerfile builds, without Docker, into a folder, and see whether the server in it becomes healthy.

python dev/container.py FOLDER [DEVICE]

Runs the steps of the first stage (COPY, RUN) with /src and /opt/venv inside FOLDER, then the server as the last stage
starts it, at a free port, until its HEALTHCHECK passes. Left out: base images, users, apt-get.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Instruction(NamedTuple):
    name: str
    flags: list[str]
    value: str

    @property
    def words(self) -> list[str]:
        """Of the JSON form or the shell's."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)


def instructions(text: str) -> list[Instruction]:
    """Those of a Dockerfile; lines that end with a backslash go on."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = []
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        words = re.match(r"((?:--\S+\s+)*)(.*)", rest.strip())
        assert words is not None
        flags, value = words[1].split(), words[2]
        if name == "HEALTHCHECK":
            value = value.removeprefix("CMD ").strip()
        found.append(Instruction(name, flags, value))
    return found


def stages(found: list[Instruction]) -> list[list[Instruction]]:
    starts = [number for number, each in enumerate(found) if each.name == "FROM"]
    return [found[start:end] for start, end in zip(starts, [*starts[1:], len(found)], strict=True)]


def build(stage: list[Instruction], folder: Path, device: str) -> dict[str, str]:
    """Run the steps of a stage in `folder`, as its user.

    Returns:
        The environment of a program in it.
    """
    environment = {**os.environ, "DEVICE": device}

    def inside(text: str) -> str:
        return text.replace("/opt/venv", str(folder / "venv"))

    work = folder / "src"
    work.mkdir(parents=True)
    for step in stage:
        if step.name == "COPY":
            *sources, target = step.words
            for source in sources:
                place = work / target if target != "./" else work / source
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, place)
        elif step.name == "ENV":
            for word in shlex.split(step.value):
                name, _, value = word.partition("=")
                environment[name] = inside(value).replace("$PATH", environment["PATH"])
        elif step.name == "RUN":
            print(f"RUN {step.value}", flush=True)
            subprocess.run(inside(step.value), shell=True, cwd=work, env=environment, check=True)
    return environment


def main(folder: Path, device: str = "cpu") -> None:
    first, last = stages(instructions((ROOT / "Dockerfile").read_text()))
    environment = build(first, folder, device)
    by_name = {each.name: each for each in last}
    port = "18765"
    command = [*by_name["ENTRYPOINT"].words, *by_name["CMD"].words]
    check = [word.replace("8000", port) for word in by_name["HEALTHCHECK"].words]
    home = folder / "home"
    home.mkdir()
    begin = time.monotonic()
    server = subprocess.Popen([port if word == "8000" else word for word in command], cwd=home, env=environment)
    try:
        while subprocess.run(check, env=environment, stderr=subprocess.DEVNULL).returncode:
            if server.poll() is not None or time.monotonic() - begin > 120:
                sys.exit("the server did not become healthy")
            time.sleep(0.2)
        print(f"healthy after {time.monotonic() - begin:.1f} s")
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
