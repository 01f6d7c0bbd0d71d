"""Dialogues made from templates, and a check of a model that was trained on them.

    python benchmarks/chat.py write chats             # train.jsonl, valid.jsonl, questions.jsonl
    blt train config=chat
    python benchmarks/chat.py check runs/chat chats/questions.jsonl

Every question has one form of answer, so a program can tell whether the model answers in it, and whether rightly. No
question of `questions.jsonl` is among those to train on.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Chile": "Santiago", "Cuba": "Havana", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Greece": "Athens",
    "Hungary": "Budapest", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Spain": "Madrid",
    "Sweden": "Stockholm", "Turkey": "Ankara",
}  # fmt: skip
COLORS = ["red", "blue", "green", "black", "white", "gray", "brown", "pink"]
THINGS = ["fish", "hat", "bird", "tree", "boat", "door", "cup", "dog", "stone", "book", "lamp", "shoe"]
SYSTEM = "You answer in one sentence."
CAPITAL_FORMS = ["What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"]
SUM_FORMS = ["What is {} plus {}?", "How much is {} plus {}?", "Add {} and {}."]
REPEAT_FORMS = ["Say {}.", "Repeat after me: {}.", "Please say {}."]
FORMS = {
    "capital": r"The capital of ({}) is ([A-Z][a-z]+)\.",
    "sum": r"({}) plus ({}) is (\d+)\.",
    "repeat": r"You said: ([a-z]+ [a-z]+)\.",
}

Question = tuple[str, str, str, list[str]]  # kind, question, answer, what the form holds of the question


def questions() -> list[Question]:
    """All there are."""
    found: list[Question] = []
    for country, city in CAPITALS.items():
        answer = f"The capital of {country} is {city}."
        found += [("capital", form.format(country), answer, [country]) for form in CAPITAL_FORMS]
    for a in range(10):
        for b in range(10):
            numbers, answer = [str(a), str(b)], f"{a} plus {b} is {a + b}."
            found += [("sum", form.format(a, b), answer, numbers) for form in SUM_FORMS]
    for color in COLORS:
        for thing in THINGS:
            words = f"{color} {thing}"
            found += [("repeat", form.format(words), f"You said: {words}.", []) for form in REPEAT_FORMS]
    return found


def messages_of(exchanges: Sequence[Question], with_system: bool) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": SYSTEM}] * with_system
    for _, question, answer, _ in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def write(folder: Path, number: int, held_out: int, seed: int) -> None:
    draw = random.Random(seed)
    shuffled = questions()
    draw.shuffle(shuffled)
    asked, known = shuffled[:held_out], shuffled[held_out:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, size, source in (("train", number, known), ("valid", max(number // 50, 10), asked)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(size):
                exchanges = draw.choices(source, k=draw.randint(1, 3))
                file.write(json.dumps({"messages": messages_of(exchanges, draw.random() < 0.5)}) + "\n")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for kind, question, answer, parts in asked:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            row = {"messages": messages, "kind": kind, "answer": answer, "form": FORMS[kind].format(*parts)}
            file.write(json.dumps(row) + "\n")
    print(f"{number:,} conversations to train on and {len(asked)} questions -> {folder}")


def check(model: str, path: Path, options: list[str]) -> dict[str, Any]:
    """Ask each question, and count answers that have the form, and those that are right."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows)
    command = [sys.executable, "-m", "bytelatent", "chat", model, "--json", "--temperature", "0", "-n", "100", *options]
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in FORMS}
    for row, answer in zip(rows, answers, strict=True):
        is_whole = answer["ended"] == "stop" and re.fullmatch(row["form"], answer["content"]) is not None
        counts[row["kind"]].update(asked=1, in_format=is_whole, right=is_whole and answer["content"] == row["answer"])
        if not is_whole:
            print(f"not in format: {row['messages'][-1]['content']!r} -> {answer['content'][:80]!r}", file=sys.stderr)
    total = sum(counts.values(), Counter())
    return {name: total[name] for name in ("asked", "in_format", "right")} | {k: dict(c) for k, c in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    writing = verbs.add_parser("write", help="write dialogues to train on, and questions")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--number", type=int, default=10_000, help="conversations to train on")
    writing.add_argument("--questions", type=int, default=100, help="questions that are held out")
    writing.add_argument("--seed", type=int, default=0)
    checking = verbs.add_parser("check", help="ask a model; further options are those of blt chat")
    checking.add_argument("model")
    checking.add_argument("questions", type=Path)
    given, more = parser.parse_known_args()
    if given.verb == "write":
        write(given.folder, given.number, given.questions, given.seed)
        return
    found = check(given.model, given.questions, more)
    for kind in FORMS:
        print(f"{kind}: {found[kind]}")
    print(f"answers in format: {found['in_format']} of {found['asked']}; right: {found['right']}")
    sys.exit(int(found["in_format"] < found["asked"]))


if __name__ == "__main__":
    main()
