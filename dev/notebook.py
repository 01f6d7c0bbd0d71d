"""Write docs/python.md as a notebook, docs/python.ipynb: its snippets of Python are the cells.

python dev/notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE, NOTEBOOK = DOCS / "python.md", DOCS / "python.ipynb"
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


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook_of(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
