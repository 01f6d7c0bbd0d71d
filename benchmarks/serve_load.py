"""Load on `blt serve`: many streaming clients at once, half of which hang up at random.

    python benchmarks/serve_load.py MODEL --clients 200 --seconds 120

It starts a server of its own on this machine, and ends with code 1 unless all of this holds: no answer is an error but
429 (the queue is full), each text that came whole is what the same request gives alone, no slot is leaked, and the
server's memory does not grow in the second half. It prints the time to the first byte and the bytes per second.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PROMPTS = ["Once", "The history of", "def main(", "caf\u00e9 ", "It was the best of times, it was the worst of times, "]
GROWTH = 1.05  # of the server's memory in the second half, at most
PAGE_BYTES = 4096


@dataclass
class Found:
    """What all clients have seen."""

    statuses: Counter[str] = field(default_factory=Counter)
    first_byte_s: list[float] = field(default_factory=list)
    num_bytes: int = 0
    hung_up: int = 0
    texts: dict[str, set[str]] = field(default_factory=dict)  # by request, as JSON
    errors: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


async def ask(host: str, port: int, body: str, found: Found, patience_s: float | None) -> str | None:
    """The text that comes for a request; None where the client hangs up, or is refused.

    Args:
        patience_s: when the client hangs up, from when it asks.
    """
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body.encode())}\r\nConnection: close\r\n\r\n{body}".encode())
        async with asyncio.timeout(patience_s):
            status = (await reader.readline()).decode().split(" ")[1]
            found.statuses[status] += 1
            text, ends = "", False
            async for line in reader:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        found.errors.append(event["error"]["message"])
                        return None
                    if not text:
                        found.first_byte_s.append(time.perf_counter() - began)
                    text += event["choices"][0]["text"]
                    found.num_bytes += len(event["bytelatent"]["bytes"])
                ends = ends or line.startswith(b"data: [DONE]")
            if status == "200" and not ends:
                found.errors.append("a stream ended early")
            if status not in ("200", "429"):
                found.errors.append(f"status {status}")
            return text if status == "200" else None
    except TimeoutError:
        found.hung_up += 1
        return None
    finally:
        writer.close()


async def client(number: int, host: str, port: int, until: float, found: Found) -> None:
    generator = random.Random(number)
    while time.monotonic() < until:
        size = generator.choice([10, 30, 60, 120])
        about = {"prompt": generator.choice(PROMPTS), "max_tokens": size, "seed": generator.randrange(8)}
        body = json.dumps({**about, "stream": True, "bytelatent": True}, sort_keys=True)
        patience = generator.uniform(0.0, 4.0) if number % 2 else None
        text = await ask(host, port, body, found, patience)
        if text is not None:
            found.texts.setdefault(body, set()).add(text)
        else:
            await asyncio.sleep(generator.uniform(0.0, 0.5))


async def watch(pid: int, until: float, found: Found) -> None:
    while time.monotonic() < until:
        found.memory.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES)
        await asyncio.sleep(1)


async def load(args: argparse.Namespace, host: str, port: int, pid: int) -> Found:
    found, until = Found(), time.monotonic() + args.seconds
    clients = (client(number, host, port, until, found) for number in range(args.clients))
    await asyncio.gather(watch(pid, until, found), *clients)
    return found


async def compare(host: str, port: int, found: Found) -> None:
    """Ask for each text again, alone."""
    for body, texts in found.texts.items():
        alone = await ask(host, port, body, Found(), None)
        if texts != {alone}:
            found.errors.append(f"{body} gave {sorted(texts)}, and alone {alone!r}")


def busy(address: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(r"^bytelatent_(?:busy_slots|waiting) (\S+)", text, re.MULTILINE))


def check(found: Found, address: str) -> list[str]:
    wrong = [*found.errors]
    deadline = time.monotonic() + 10
    while (left := busy(address)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        wrong.append(f"{left:.0f} sequences are in slots or wait, though nobody asks")
    middle = found.memory[len(found.memory) // 2 :]
    early, late = middle[: len(middle) // 4], middle[-len(middle) // 4 :]
    if early and statistics.mean(late) > GROWTH * statistics.mean(early):
        wrong.append(f"memory grew from {statistics.mean(early):,.0f} to {statistics.mean(late):,.0f} bytes")
    return wrong


def started(command: list[str]) -> tuple["subprocess.Popen[str]", str]:
    """A server, once it is ready, and its address."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"open (http://\S+) in", line)
    if match is None:
        sys.exit(f"the server did not start: {line}")
    while True:
        try:
            urllib.request.urlopen(f"{match[1]}/ready")
            return process, match[1]
        except OSError:
            if process.poll() is not None:
                sys.exit("the server ended")
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    command = [sys.executable, "-m", "bytelatent", "serve", args.model, "--port", "0", "--batch-size"]
    process, address = started([*command, str(args.batch_size)])
    try:
        host, _, port = address.removeprefix("http://").rpartition(":")
        found = asyncio.run(load(args, host, int(port), process.pid))
        wrong = check(found, address)
        asyncio.run(compare(host, int(port), found))
        wrong = list(dict.fromkeys([*wrong, *found.errors]))
    finally:
        process.terminate()
        process.wait(60)
    first = sorted(found.first_byte_s)
    whole = sum(map(len, found.texts.values()))
    print(f"{args.clients} clients, {args.seconds:g} s, batches of {args.batch_size}: statuses {dict(found.statuses)}")
    print(f"{found.hung_up:,} hung up; {whole:,} different texts came whole and were asked for again alone")
    if first:
        at = {share: first[min(int(share * len(first)), len(first) - 1)] for share in (0.5, 0.99)}
        print(f"time to first byte: p50 {at[0.5]:.3f} s, p99 {at[0.99]:.3f} s of {len(first):,}")
    print(f"{found.num_bytes / args.seconds:,.0f} bytes/s; memory {max(found.memory) / 1e6:,.0f} MB at most")
    if process.returncode != 0:
        wrong.append(f"the server ended with code {process.returncode}")
    for line in wrong[:20]:
        print(f"wrong: {line[:300]}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
