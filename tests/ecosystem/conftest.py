"""Rows of the table of modules, and the option that writes it."""

from pathlib import Path

import pytest
from modules import CASES
from table import Row, page

ROWS = pytest.StashKey[dict[str, Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--modules-table", type=Path, help="write the table of modules to this file after a whole run")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> dict[str, Row]:
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path, rows = config.getoption("--modules-table"), config.stash[ROWS]
    if path is None:
        return
    absent = [case.title for case in CASES if case.title not in rows]
    if absent:
        terminalreporter.write_line(f"{path} is not written: {len(absent)} modules did not run")
        return
    path.write_text(page([rows[case.title] for case in CASES]))
    terminalreporter.write_line(f"{path} is written")
