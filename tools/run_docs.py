"""Run the Python code blocks of Markdown files, those of one file in one namespace, from top to bottom.

    python tools/run_docs.py README.md docs/*.md

Comments that a reader of the page does not see stand on the line before a block:

- ``<!-- given`` with Python code up to ``-->`` makes what the block takes for granted;
- ``<!-- not run: why -->`` leaves the block out, and is printed.

The library's streams have no end. A block that has taken ``STEPS`` optimizer steps has run.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 25
BLOCK = re.compile(r"(?:<!-- (?P<hidden>(?:given|not run:).*?)-->\n)?^```python *\n(?P<code>.*?)^```", re.S | re.M)


class EnoughError(BaseException):
    """Stops a block that has run long enough; not an ``Exception``, which a block may catch."""


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        line: of its first statement in the file.
        code: the block.
        given: code that runs before it.
        reason: why it is not run; empty if it is.
    """

    line: int
    code: str
    given: str
    reason: str


def blocks(text: str) -> list[Block]:
    """The Python blocks of a Markdown text."""
    found = []
    for match in BLOCK.finditer(text):
        hidden = match["hidden"] or ""
        reason = " ".join(hidden.removeprefix("not run:").split()) if hidden.startswith("not run:") else ""
        given = hidden.removeprefix("given") if hidden.startswith("given") else ""
        found.append(Block(text.count("\n", 0, match.start("code")) + 1, match["code"], given, reason))
    if len(found) != len(re.findall(r"^ *```py", text, re.M)):
        raise ValueError("a block of Python does not begin with the line ```python, without indentation")
    return found


def run(path: Path) -> tuple[int, int]:
    """Run the blocks of a file; returns how many ran and how many were left out."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    taken = 0

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == STEPS:
            raise EnoughError

    namespace: dict[str, Any] = {"__name__": "__main__"}
    ran = left_out = 0
    for block in blocks(path.read_text()):
        if block.reason:
            print(f"{path}:{block.line}: not run: {block.reason}")
            left_out += 1
            continue
        torch.manual_seed(0)
        taken, start = 0, time.perf_counter()
        hook = register_optimizer_step_post_hook(count)
        try:
            exec(compile(block.given, f"{path} (given for line {block.line})", "exec"), namespace)
            # Errors name the line in the file.
            exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
        except EnoughError:
            pass
        finally:
            hook.remove()
        ran += 1
        print(f"{path}:{block.line}: ran, {taken} optimizer steps, {time.perf_counter() - start:.1f} s")
    return ran, left_out


def main(arguments: list[str] | None = None) -> int:
    """Run the blocks of some files; the first error ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    counts = [run(path) for path in parser.parse_args(arguments).files]
    print(f"{sum(ran for ran, _ in counts)} blocks ran, {sum(left_out for _, left_out in counts)} were left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
