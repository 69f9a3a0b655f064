"""Docstrings for the reference of the docs: what is written as reStructuredText in them, as Markdown.

An extension of griffe, which mkdocstrings reads the library with (``mkdocs.yml``): roles such as ``:class:`` become
links to public names, equations become MathML, and simple tables and code blocks those of Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod|exc):`(~?)([\w.]+)`")
# A directive on one line, or with a block that is indented further.
MATH = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*|\n *(?=\n\1 +\S))*)", re.MULTILINE)
CODE = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +\S.*\n|\n(?=\1 +\S))+)", re.MULTILINE)
TABLE = re.compile(r"^(=+(?: +=+)+)\n(.*?)\n\1\n(.*?)\n\1$", re.MULTILINE | re.DOTALL)


def _role(found: re.Match[str]) -> str:
    short = found[2].rpartition(".")[2] if found[1] else found[2]
    public = re.fullmatch(r"sparse_rtrl\.[A-Z]\w+", found[2]) or found[2] in ("sparse_rtrl.estimate",)
    return f"[`{short}`][{found[2]}]" if public else f"`{short}`"


def _math(found: re.Match[str]) -> str:
    latex = " ".join(line.strip() for line in found[2].splitlines() if line.strip())
    lines = (convert(line.strip(), display="block") for line in latex.split("\\\\"))
    return "\n".join(f"{found[1]}{line}" for line in lines) + "\n"


def _code(found: re.Match[str]) -> str:
    lines = found[3].rstrip("\n").splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line)
    return "\n".join([f"```{found[2]}", *(line[indent:] for line in lines), "```", ""])


def _table(found: re.Match[str]) -> str:
    columns = [match.span() for match in re.finditer("=+", found[1])]

    def cells(line: str) -> list[str]:
        ends = [start for start, _ in columns[1:]] + [None]
        return [line[start:end].strip() for (start, _), end in zip(columns, ends, strict=True)]

    rows: list[list[str]] = []
    for line in found[3].splitlines():
        row = cells(line)
        if row[0] or not rows:
            rows.append(row)
        else:  # goes on with the row before
            rows[-1] = [f"{before} {more}".strip() for before, more in zip(rows[-1], row, strict=True)]
    lines = [cells(found[2]), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(text: str) -> str:
    """A docstring with its roles, equations, tables and code blocks in Markdown."""
    for pattern, replacement in ((CODE, _code), (MATH, _math), (TABLE, _table), (ROLE, _role)):
        text = pattern.sub(replacement, text)
    return text


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
