"""Write pages of the docs as notebooks: their snippets of Python are the cells.

python dev/notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = {page: page.with_suffix(".ipynb") for page in (DOCS / "python.md", DOCS / "notebooks" / "first_steps.md")}
SNIPPET = re.compile(r"^```python\n(.*?)^```\n", flags=re.DOTALL | re.MULTILINE)


def notebook_of(page: str) -> str:
    """The notebook of a page, as JSON."""
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(SNIPPET.split(page)):  # every second one is a snippet
        lines = part.strip().splitlines(keepends=True)
        if lines and number % 2:
            cells.append({"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines})
        elif lines:
            cells.append({"cell_type": "markdown", "metadata": {}, "source": lines})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    found = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def cells_of(notebook: Path) -> list[str]:
    """The code of a notebook."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


if __name__ == "__main__":
    for page, notebook in NOTEBOOKS.items():
        notebook.write_text(notebook_of(page.read_text(encoding="utf-8")), encoding="utf-8")
