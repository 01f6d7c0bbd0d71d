"""One word for one thing: the words that names, docs, help, comments and messages do not use, and what they use.

Names are compared part by part (`max_damaged` has the parts `max` and `damaged`), prose by phrases.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
NAMES = {  # part of a name -> what to write
    "rule|rules": "patching (settings) or mode",
    "surprise|surprises": "cross_entropy or loss",
    "rounded": "quantized",
    "damaged|torn": "bad (a row), corrupt (a file)",
    "say|tell|told|notice": "log, warn, print, show",
    "turn|turns|angle|angles": "rotary",
    "floor|floors|rooms": "layer, package, limit",
    "anew": "again, a new",
    "gatherbytes": "EncoderCrossAttention",
    "readpatches": "DecoderCrossAttention",
}
DECODING_NAMES = {  # words that mean something else in other packages
    "look|looks|kept": "cache, cached",
    "places": "slots (engine), batch_size (commands)",
}
DECODING = ("inference", "kernels", "model", "blt", "generate.py", "test_blt.py", "decode.py", "decode_trained.py")
PROSE = {
    r"\bis none\b": "there is no ...",
    r"\banew\b": "again",
    r"\bso many\b": "the number",
    r"\bwill not do\b": "say what is needed",
    r"\b(is|are|was|be) (told|said)\b|\b(told|says so)\b": "log, warn, print, show",
    r"\b(go|goes|going|went) on with\b": "resume",
    r"\b(looks? at|looks? back)\b": "attends to, sees",
    r"\bwhat lies before\b": "prefix",
    r"\bon (their|its) way\b": "batch size",
    r"\bread(ing|s)? (a prompt|with a memory)\b": "prefill, decode step",
    r"\bsurprises?\b": "cross-entropy",
    r"\b(damaged|torn)\b": "bad (a row), corrupt (a file)",
    r"\brules?\b": "patching settings, patching mode",
    r"\brounded (weights|models?|matri|linear|to (int8|fp8|float8))": "quantized",
    r"\b(bytes|bits|keys|flops|ms|entries|rows|words) an? (byte|patch|second|step|file|row|line|document)\b": "per",
    r"\bparameters that compute\b": "non-embedding parameters",
    r"\bdivided by rows\b": "row-sharded",
    r"\b(GatherBytes|ReadPatches)\b": "EncoderCrossAttention, DecoderCrossAttention",
    r"\bfloors?\b|\brooms\b": "layer, package, limit",
    r"\bstands (apart|alone|where|beside|in|for itself)\b": "is",
    r"\bmax_(damaged|corrupt)\b": "max_bad_rows",
}
# Where an old word is right: a name of a file format, of another library, or an old name that users may still write.
ALLOWED = {
    "bytelatent/data/loader.py": "damaged",  # a key of checkpoints
    "bytelatent/data/settings.py": "max_damaged",
    "bytelatent/data/source.py": "damaged",
    "bytelatent/prepare/plan.py": "max_corrupt",
    "bytelatent/prepare/write.py": "max_corrupt",
    "bytelatent/training/metrics.py": "damaged",  # a name of a file
    "bytelatent/text/stored.py": "rule",  # a key of files
    "bytelatent/commands/options.py": "rule|max_damaged",  # hidden options
    "docs/reference.md": "rule|damaged",  # a key and a name of files
    "docs/train.md": "damaged",
}
NAME = re.compile("|".join(NAMES), re.IGNORECASE)
DECODING_NAME = re.compile("|".join(NAMES | DECODING_NAMES), re.IGNORECASE)
PHRASE = re.compile("|".join(f"(?:{phrase})" for phrase in PROSE))


def files(*under: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *under], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return [PROJECT / name for name in listed.splitlines() if name != "tests/test_words.py"]


def old_names(name: str, forbidden: re.Pattern[str] = NAME) -> list[str]:
    """The old words among the parts of a name."""
    parts = re.split(r"_|(?<=[a-z0-9])(?=[A-Z])", name)
    return [part for part in dict.fromkeys([name, *parts]) if forbidden.fullmatch(part)]


def old_phrases(text: str) -> list[str]:
    return [match.group() for match in PHRASE.finditer(" ".join(text.split()))]


def findings_of_code(path: Path, prose: bool) -> Iterator[str]:
    name = path.relative_to(PROJECT)
    forbidden = DECODING_NAME if set(name.parts) & set(DECODING) else NAME
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        found: list[str] = []
        if token.type == tokenize.NAME:
            found = [f"{token.string}: {word}" for word in old_names(token.string, forbidden)]
        elif prose and token.type in (tokenize.STRING, tokenize.COMMENT):
            found = old_phrases(token.string)
        for word in found:
            if not re.search(ALLOWED.get(str(name), r"(?!)"), word):
                yield f"{name}:{token.start[0]}: {word}"


def findings_of_page(path: Path) -> Iterator[str]:
    name = path.relative_to(PROJECT)
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        for word in old_phrases(paragraph):
            if not re.search(ALLOWED.get(str(name), r"(?!)"), word):
                yield f"{name}: {word}: {paragraph.strip().splitlines()[0][:60]}"


@pytest.mark.parametrize(
    ("under", "prose"),
    [("bytelatent", True), ("setup", True), ("tests", False), ("benchmarks", False), ("dev", False)],
)
def test_code_uses_one_word_for_one_thing(under: str, prose: bool) -> None:
    """In the package also what users read: docstrings are help, strings are messages."""
    found = [line for path in files(under) if path.suffix == ".py" for line in findings_of_code(path, prose)]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_pages_use_one_word_for_one_thing() -> None:
    pages = [path for path in files("README.md", "CONTRIBUTING.md", "docs") if path.suffix == ".md"]
    assert pages
    found = [line for page in pages for line in findings_of_page(page)]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It reads 4 bytes a patch, and the\n   limit is none.", ["bytes a patch", "is none"]),
        ("A bad row is logged; 4 bytes per patch.", []),
        ("the rule that the user is told", ["rule", "is told"]),
    ],
)
def test_phrases_are_found_across_lines(text: str, words: list[str]) -> None:
    assert old_phrases(text) == words


@pytest.mark.parametrize(("name", "words"), [("max_damaged", ["damaged"]), ("RotaryTurn", ["Turn"]), ("lookup", [])])
def test_parts_of_names_are_found(name: str, words: list[str]) -> None:
    assert old_names(name) == words


SAME_IN_EACH_VERB = {"run", "main", "command"}


def test_public_names_are_used_once() -> None:
    """A class or function of the package has its name for itself; the verbs' functions have the same ones."""
    defined_in: dict[str, list[str]] = {}
    for path in files("bytelatent"):
        if path.suffix == ".py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    defined_in.setdefault(node.name, []).append(str(path.relative_to(PROJECT)))
    twice = {name: where for name, where in defined_in.items() if len(where) > 1 and name not in SAME_IN_EACH_VERB}
    assert not twice
