"""Structured output: is it exact, what does a mask cost, and do others wait for it?

    python benchmarks/structured.py violations [--count 10000]
    python benchmarks/structured.py masks
    python benchmarks/structured.py beside [--model tiny] [--device auto] [--sequences 8] [--new 300]

violations  random JSON schemas and expressions, for each of which a tiny random model writes a text at temperature 1;
            checked by the packages jsonschema and regex (pip install -e '.[test-serve]')
masks       time per byte: reading it, and what may come next; and time to compile
beside      bytes/s of sequences without a constraint: alone, beside as many others without, and beside as many with one
"""

import argparse
import json
import time
from collections import Counter
from typing import Any

from bytelatent import BLT
from bytelatent.device import choose_device
from bytelatent.errors import UserError
from bytelatent.inference import Continuation, Engine, Sampling
from bytelatent.inference.constraint import Constraint
from bytelatent.vocab import EOS

HOT = Sampling(temperature=1.0)
MAX_NEW_BYTES = 1500
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "emails": {"type": "array", "items": {"type": "string", "format": "email"}, "maxItems": 5},
        "manager": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "emails", "manager"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "nested schema": {"schema": PERSON},
    "any JSON object": {"schema": {"type": "object"}},
    "expression": {"regex": r"(?:[\w.]+@\w+\.com\n)*"},
    "200 values": {"schema": {"enum": [f"value {number} é" for number in range(200)]}},
    "grammar": {"grammar": 'start: term (("+" | "-") term)*\nterm: /[0-9]+/ | "(" start ")"'},
}


def violations(count: int) -> None:
    from tests.inference.test_engine import decoder_of, engine_of
    from tests.serving.random_constraints import case

    engine = engine_of(decoder_of("entropy"), "fast", 64)
    found: Counter[str] = Counter()
    num_bytes, began, waiting = 0, time.perf_counter(), []
    for number in range(count):
        one, kind = case(number), "schema" if number % 3 < 2 else "regex"
        try:
            constraint = Constraint.of(**one.given)
        except UserError:
            found[f"{kind}: refused"] += 1
            continue
        sampling = HOT.model_copy(update={"seed": number})
        waiting.append((number, kind, one, engine.submit(b"x", sampling, MAX_NEW_BYTES, constraint=constraint)[0]))
        while engine.num_waiting or (number + 1 == count and not engine.is_idle):
            engine.advance()
        for number, kind, one, done in [each for each in waiting if each[3].ended]:
            num_bytes += len(done.data)
            is_met = done.ended != "end of text" or one.is_met(done.data.decode())
            found[f"{kind}: {done.ended if is_met else 'VIOLATION'}"] += 1
            if not is_met or done.ended == "failed":
                print(f"case {number}: {json.dumps(one.given, ensure_ascii=False)}\n  {done.ended}: {done.data!r}")
        waiting = [each for each in waiting if not each[3].ended]
    seconds = time.perf_counter() - began
    print(f"{count:,} cases, {num_bytes:,} bytes, {seconds:.0f} s")
    for name, number in sorted(found.items()):
        print(f"  {name:24} {number:,}")
    print(f"  violations               {sum(found[name] for name in found if 'VIOLATION' in name)}")


def masks() -> None:
    import random

    print(f"{'constraint':18} {'compile, ms':>12} {'mask, us/byte':>14} {'worst, us':>10}")
    for name, given in CONSTRAINTS.items():
        began = time.perf_counter()
        constraint = Constraint.of(**given)
        compiled = time.perf_counter() - began
        assert constraint is not None
        chance, taken = random.Random(0), []
        while len(taken) < 5000:
            state = constraint.start()
            while (id_ := chance.choice(state.allowed.nonzero()[0].tolist())) != EOS and len(taken) < 5000:
                began = time.perf_counter()
                state.read(id_)
                taken.append(time.perf_counter() - began)
        mean, worst = sum(taken) / len(taken) * 1e6, sorted(taken)[-5] * 1e6
        print(f"{name:18} {compiled * 1e3:12.1f} {mean:14.1f} {worst:10.0f}")


def beside(model: str, device: str, sequences: int, new: int) -> None:
    blt = BLT.from_pretrained(model, device=device)
    bound = Constraint.of(regex=rf"[ -~]{{{10 * new}}}")
    rates: dict[str, list[float]] = {}
    for _ in range(3):
        for name, others in (("alone", 0), ("beside others", sequences), ("beside constrained ones", sequences)):
            constraint = bound if "constrained" in name else None
            engine = blt.engine(sequences + others)
            rates.setdefault(name, []).append(_rate(engine, sequences, others, new, constraint))
    for name, found in rates.items():
        print(f"{name:26} {max(found):10,.0f} bytes/s of {sequences} without a constraint")
    without, constrained = max(rates["beside others"]), max(rates["beside constrained ones"])
    print(f"beside constrained ones: {constrained / without:.1%} of what they have beside others")


def _rate(engine: Engine, count: int, others: int, new: int, constraint: Constraint | None) -> float:
    """Bytes/s of sequences of which none ends, while others are there."""
    prompt = b"The history of "

    def asked(number: int, size: int, given: Constraint | None) -> list[Continuation]:
        no_end = Sampling(temperature=0) if given is None else HOT  # the likeliest byte of a model is rarely the end
        return [engine.submit(prompt, no_end, size, constraint=given)[0] for _ in range(number)]

    measured = asked(count, new, None)
    _ = asked(others, 4 * new, constraint)
    for _ in range(20):  # compiled, captured, read
        engine.advance()
    done, began = sum(len(one.ids) for one in measured), time.perf_counter()
    while any(one.ended is None for one in measured):
        engine.advance()
    return (sum(len(one.ids) for one in measured) - done) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["violations", "masks", "beside"])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--new", type=int, default=300)
    asked = parser.parse_args()
    if asked.what == "violations":
        violations(asked.count)
    elif asked.what == "masks":
        masks()
    else:
        beside(asked.model, str(choose_device(asked.device)), asked.sequences, asked.new)


if __name__ == "__main__":
    main()
