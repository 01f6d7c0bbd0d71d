"""The package layers: a package imports only from layers below its own, or from itself, and never in a circle."""

import ast
from pathlib import Path

import bytelatent

PACKAGE = "bytelatent"
ROOT = Path(bytelatent.__file__).parent
LAYERS = [  # the lowest first
    ["credentials", "terminal", "signals", "packaged"],
    ["errors", "log"],
    ["vocab", "config", "files", "device", "progress", "kernels"],
    ["hub", "run_folder", "command_line", "lm_eval_model"],
    ["model", "patching", "text", "launch"],
    ["inference", "data", "prepare", "weights"],
    ["training", "evaluation", "report"],
    ["blt"],
    ["serving", "study", "hf"],
    ["commands"],
    ["cli"],
    ["__main__", "train", "eval", "generate", "stool"],
]
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}


HOLDS = {  # what a package is for, where its name does not say it
    "cli": "`blt VERB`: options from the settings' fields",
    "commands": "what each verb does",
    "blt": "the public class",
    "hf": "classes registered with transformers",
    "serving": "HTTP API, scheduler, page",
    "study": "models compared at equal training FLOPs: plans, runs, results, figures",
    "training": "trainer, checkpoints, distributed plans, profiling",
    "evaluation": "bits per byte, tasks, noise, characters",
    "report": "pages and figures",
    "inference": "KV caches, decoder, engine, sampling, the captured step",
    "data": "text to batches",
    "prepare": "download, shuffle, split",
    "weights": "formats of weights in and out",
    "model": "byte LM and BLT",
    "patching": "patching modes, thresholds",
    "text": "documents out of files",
    "launch": "SLURM jobs",
    "kernels": "one file per operation",
    "packaged": "the model that the package brings",
    "lm_eval_model": "registers our model with lm_eval",
}
DOCS = Path(__file__).parents[1] / "docs" / "internals" / "layers.md"


def as_markdown() -> str:
    """The table of layers, the highest first, of the packages that there are."""
    there = {name.split(".")[1] for name in modules()}
    lines = ["| layer | packages |", "| --- | --- |"]
    for number, packages in reversed(list(enumerate(LAYERS, start=1))):
        cells = [f"`{name}` ({HOLDS[name]})" if name in HOLDS else f"`{name}`" for name in packages if name in there]
        if cells:
            lines.append(f"| {number} | {', '.join(cells)} |")
    return "\n".join(lines) + "\n"


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """The modules of the package that a file imports, at its head or inside a function, as dotted names."""
    package = [PACKAGE, *path.relative_to(root).parts[:-1]]
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # What a file does as a command is nothing that others import.
    tree.body = [node for node in tree.body if not is_for_the_command(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if is_module(inner, root) else origin)
    return {module for module in found if module.split(".")[0] == PACKAGE}


def is_for_the_command(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_module(dotted: str, root: Path) -> bool:
    parts = dotted.split(".")
    place = root.joinpath(*parts[1:])
    return parts[0] == PACKAGE and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file())


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every file of the package by its dotted name, but for the package's own `__init__`, which is the public face."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])
        if name != PACKAGE:
            found[name] = path
    return found


def wrong_imports(root: Path = ROOT) -> list[str]:
    wrong = []
    for name, path in modules(root).items():
        package = name.split(".")[1]
        for imported in sorted(imports(path, root) - {PACKAGE}):
            other = imported.split(".")[1]
            if other != package and LAYER.get(other, len(LAYERS)) >= LAYER.get(package, 0):
                wrong.append(f"{name} imports {imported}")
        if PACKAGE in imports(path, root) and LAYER.get(package, 0) < LAYER["commands"]:
            wrong.append(f"{name} imports {PACKAGE} itself, the public face")
    return wrong


def circle(root: Path = ROOT) -> list[str]:
    """Modules that import one another in a circle, if any do."""
    edges = {name: imports(path, root) - {name} for name, path in modules(root).items()}
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for imported in sorted(edges.get(name, ())):
                if found := walk(imported, [*way, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def test_every_package_has_a_layer() -> None:
    unknown = {name.split(".")[1] for name in modules()} - LAYER.keys()
    assert not unknown, f"add these to LAYERS: {sorted(unknown)}"


def test_imports_come_from_layers_below() -> None:
    assert wrong_imports() == []


def test_the_docs_show_the_layers() -> None:
    """To write the page again: `python -m tests.test_layers`."""
    assert as_markdown() in DOCS.read_text(encoding="utf-8")


def test_no_circles() -> None:
    assert circle() == []


def test_wrong_imports_and_circles_are_seen(tmp_path: Path) -> None:
    for name, text in {
        "config.py": "from bytelatent import vocab",
        "vocab.py": "import bytelatent.errors",
        "patching/modes.py": "def late():\n    from ..data.loader import read",
        "data/loader.py": "from bytelatent.patching import modes\nfrom . import packing",
        "data/packing.py": "from .loader import read",
        "model/blt.py": "from bytelatent.model.blocks import Block\nimport bytelatent.cli as c, torch",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "patching" / "__init__.py").touch()
    assert wrong_imports(tmp_path) == [
        "bytelatent.config imports bytelatent.vocab",
        "bytelatent.model.blt imports bytelatent.cli",
        "bytelatent.patching.modes imports bytelatent.data.loader",
    ]
    assert circle(tmp_path) == ["bytelatent.data.loader", "bytelatent.data.packing", "bytelatent.data.loader"]


if __name__ == "__main__":
    head = DOCS.read_text(encoding="utf-8").partition("| layer |")[0]
    DOCS.write_text(head + as_markdown(), encoding="utf-8")
