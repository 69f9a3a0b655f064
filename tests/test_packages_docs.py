"""The Python of README and docs runs; and the tool that says so can fail."""

import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tools import run_docs

ROOT = Path(__file__).parents[1]


def test_blocks_of_the_docs_run():
    command = [sys.executable, run_docs.__file__, "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^README\.md:\d+: ran, 25 optimizer steps", done.stdout, re.M)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Words.\n\n```python\nx = 1\nundefined_name\n```\n", "line 5, in <module>"),
        ("<!-- given\ny = 2\n-->\n```python\nassert y == 3\n```\n", "line 5, in <module>"),
        ("- item\n  ```python\n  x = 1\n  ```\n", "does not begin with the line ```python"),
        ("```py\nx = 1\n```\n", "does not begin with the line ```python"),
    ],
)
def test_blocks_that_do_not_run_are_found(tmp_path, text, message):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises((NameError, AssertionError, ValueError)) as caught:
        run_docs.main([str(tmp_path / "page.md")])
    assert message in "".join(traceback.format_exception(caught.value))


def test_marks_of_blocks(tmp_path, capsys):
    (tmp_path / "page.md").write_text(
        "```python\nx = 1\n```\n<!-- given\ny = x + 1\n-->\n```python\nassert (x, y) == (1, 2)\n```\n"
        "<!-- not run: needs\na GPU -->\n```python\nundefined_name\n```\n"
    )
    assert run_docs.main([str(tmp_path / "page.md")]) == 0
    output = capsys.readouterr().out
    assert "page.md:13: not run: needs a GPU" in output and "2 blocks ran, 1 were left out" in output
