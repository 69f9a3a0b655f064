"""Tables and pictures of README and docs are those of the records; pages of examples run; the reference is complete."""

import re
from pathlib import Path

import pytest

import sparse_rtrl

ROOT = Path(__file__).parent.parent


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import figures

    return figures


@pytest.fixture
def copied(figures, monkeypatch, tmp_path):
    """The script on a README and a picture of its own."""
    (tmp_path / "docs").mkdir()
    marked = "<!-- figures: demo -->\nstale\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(f"before\n{marked}after\n![](docs/p/dot.png)\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PICTURES", tmp_path / "docs" / "p")
    monkeypatch.setattr(figures, "TABLES", {"demo": figures.TABLES["demo"]})

    def dot(path):
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().plot([0, 1])
        figure.savefig(path)

    monkeypatch.setattr(figures, "DRAWN", {"dot": (("demo.json",), dot)})
    return tmp_path


def test_tables_and_pictures_are_those_of_their_records(figures, capsys):
    status = figures.main([])
    assert status == 0, capsys.readouterr().err


def test_what_differs_is_named_and_rewritten(figures, copied, capsys):
    assert figures.main([]) == 1
    said = capsys.readouterr().err
    assert "README.md: demo differs" in said and "dot.png is not of its records demo.json" in said
    assert "stale" in (copied / "README.md").read_text()
    assert figures.main(["--write"]) == 0
    text = (copied / "README.md").read_text()
    assert text.startswith("before\n<!-- figures: demo -->\n| task | method |")
    assert text.endswith("<!-- end -->\nafter\n![](docs/p/dot.png)\n")
    assert figures.main([]) == 0
    (copied / "README.md").write_text(text.replace("100.0 %", "100.1 %"))
    assert figures.main([]) == 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("<!-- figures: nothing -->\n<!-- end -->\n", "no table is called nothing; there are demo"),
        ("<!-- figures: demo -->\n", "must end with <!-- end -->"),
        ("", "no page has the table demo"),
    ],
)
def test_markers_that_lead_nowhere_are_named(figures, copied, capsys, text, said):
    (copied / "README.md").write_text(text)
    assert figures.main(["--write"]) == 1
    assert said in capsys.readouterr().err


def test_tables_say_what_a_record_leaves_open(figures, monkeypatch):
    assert "(commit not recorded)" in figures.source("tree_merges.json")
    assert "commit `223996c`" in figures.source("compare_cpu.json")
    rows = figures.load("compare_cpu.json")["rows"]
    for row in rows:
        row["runs"] = row.get("runs") and 3
    assert "0.14¹" in figures.TABLES["compare"]()  # a single run is no median
    monkeypatch.setattr(figures, "load", lambda name: {"rows": rows})
    assert "0.14¹" not in figures.TABLES["compare"]() and "0.14 (3)" in figures.TABLES["compare"]()


@pytest.mark.parametrize(
    "name, arguments, shown",
    [
        ("first_gradient", [], "weight_hh "),
        ("own_cell", [], "experts.weight "),
        ("million_tokens", ["20000"], "right answers"),
    ],
)
def test_example_pages_run(monkeypatch, name, arguments, shown):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import docs_site

    page = docs_site.page(name, arguments)
    assert re.match(r"# A [\w ]+\n", page)
    outputs = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert any(shown in output for output in outputs)
    assert "# %%" not in page and f"examples/{name}.py" in page


def test_a_cell_of_a_page_that_fails_is_not_hidden(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import docs_site

    monkeypatch.setattr(docs_site, "EXAMPLES", tmp_path)
    (tmp_path / "bad.py").write_text('"""A title."""\n\n# %%\n# Text.\n\nassert 1 == 2\n')
    with pytest.raises(AssertionError):
        docs_site.page("bad")


def test_reference_lists_every_public_name():
    listed = re.findall(r"^::: sparse_rtrl\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(sparse_rtrl.__all__)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
