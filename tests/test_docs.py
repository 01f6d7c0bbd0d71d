"""Links of the docs lead somewhere, and the snippets of the pages about Python and generation run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.commands.generate import GenerateSettings, main
from bytelatent.config import load_yaml
from bytelatent.model import PRESETS
from bytelatent.study.plan import load_plan
from dev.notebook import DOCS, NOTEBOOKS, cells_of, notebook_of
from tests.model.tiny import tiny_blt, tiny_blt_settings
from tests.test_blt import wrap

ROOT = Path(__file__).parents[1]
PAGES = [page for place in ("*.md", "docs/**/*.md", "dev/*.md", "benchmarks/*.md") for page in ROOT.glob(place)]
GENERATE, PYTHON = "docs/generate.md", "docs/python.md"


def anchor(heading: str) -> str:
    """As GitHub makes one of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, wanted = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if wanted:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert wanted in map(anchor, headings), link


def test_the_page_about_figures_makes_all_runs_that_it_draws() -> None:
    commands = "\n".join(snippets("docs/figures.md", "bash")).replace("\\\n", " ").splitlines()
    made = {"runs/demo", "runs/lr", load_yaml(ROOT / "apps/bytelatent/configs/demo_blt_space.yaml")["run"]}
    assert all(any(maker in line for line in commands) for maker in ("blt demo ", "=demo_blt_space", "run=runs/lr/$lr"))
    drawn = {name for line in commands if line.startswith("blt plot") for name in re.findall(r"runs/\w+", line)}
    assert drawn == made
    assert not any("docs/" in line for line in commands)  # the project's own figures are not overwritten


def snippets(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page names: a model, prompts, a prompt, settings."""
    wrap(tiny_blt(window=6)).save_pretrained(tmp_path / "runs" / "demo")
    (tmp_path / "prompt.txt").write_text("A prompt")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "title": 1}\n')
    (tmp_path / "generate.yaml").write_text(snippets(GENERATE, "yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [GENERATE, PYTHON])
def test_python(here: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setitem(PRESETS, "demo-blt", tiny_blt_settings(window=6))
    names: dict[str, Any] = {}
    found = snippets(page, "python") if page == GENERATE else cells_of(NOTEBOOKS[DOCS / "python.md"])
    for snippet in found:  # one after another, as they are read
        exec(compile(snippet, page, "exec"), names)
    assert isinstance(names["model" if page == GENERATE else "blt"], BLT)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_the_notebook_is_the_page(page: Path) -> None:
    """To write it again: `python dev/notebook.py`."""
    text, notebook = page.read_text(encoding="utf-8"), NOTEBOOKS[page]
    assert notebook.read_text(encoding="utf-8") == notebook_of(text)
    assert cells_of(notebook) == [snippet.strip() for snippet in snippets(str(page.relative_to(ROOT)), "python")]
    sources = ["".join(cell["source"]) for cell in json.loads(notebook_of(text))["cells"]]
    assert sources[0].startswith("# ")
    assert not any("```python" in source for source in sources)


def test_commands(here: Path) -> None:
    assert GenerateSettings.parse(load_yaml("generate.yaml")).sampling.temperature == 0.7
    commands = [
        line for snippet in snippets(GENERATE, "bash") for line in snippet.splitlines() if line.startswith("blt ")
    ]
    assert len(commands) == 5
    for command in commands:
        arguments = shlex.split(command.replace("$'\\n\\n'", "'\n\n'"), comments=True)[1:]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    main(["config=generate.yaml", "sampling.top_p=0.9"])
    assert (here / "answers.jsonl").read_text().count("\n") == 1


def test_the_plan_of_the_page_about_studies_is_one(tmp_path: Path) -> None:
    """With the trials of the page."""
    plan = tmp_path / "mine.yaml"
    plan.write_text("".join(snippets("docs/study/repeat.md", "yaml")))
    read = load_plan(plan)
    found = {is_trial: list(read.drafts(tmp_path / "study", is_trial)) for is_trial in (False, True)}
    assert all(found.values())
    assert read.trials is not None
