"""A hook of mkdocs (``mkdocs.yml``): scripts as pages, and links that leave the site.

Whenever the docs are built, each script of :data:`PAGES` in ``examples/`` is run cell by cell, and becomes a page of
its text, its code and its output. A script begins with a docstring, title and introduction, and is cut into cells by
lines ``# %%``; comments at the start of a cell are text in Markdown. A cell that fails makes the build fail.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PAGES = ("first_gradient", "own_cell", "million_tokens")


def cells(source: str) -> tuple[str, list[tuple[str, str]]]:
    """Introduction of a script, and text and code of each of its cells."""
    head, *parts = source.split("\n# %%\n")
    title, _, introduction = (ast.get_docstring(ast.parse(head)) or "").partition("\n")
    found = []
    for part in parts:
        lines = part.splitlines()
        end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        found.append(("\n".join(line[1:].strip() for line in lines[:end]), "\n".join(lines[end:]).strip("\n")))
    return f"# {title.rstrip('.')}\n{introduction}\n", found


def page(name: str, arguments: Sequence[str] = ()) -> str:
    """Run ``examples/NAME.py`` with these arguments and return its page in Markdown."""
    path = EXAMPLES / f"{name}.py"
    introduction, parts = cells(path.read_text())
    lines = [introduction]
    module: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    with mock.patch.object(sys, "argv", [str(path), *arguments]):
        for text, code in parts:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, str(path), "exec"), module)
            lines += [text, "", "```python", code, "```", ""]
            if output.getvalue():
                lines += ["```text", output.getvalue().rstrip(), "```", ""]
    lines.append(f"*The script is `examples/{name}.py`; the output is that of the run that built this page.*\n")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files of the repository that lie outside of ``docs/`` instead of linking them; called by mkdocs."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those of the site; called by mkdocs."""
    from mkdocs.structure.files import File

    for name in PAGES:
        files.append(File.generated(config, f"examples/{name}.md", content=page(name)))
    return files
