"""Every public function that takes or returns a tensor says its shape."""

import ast
import re
from pathlib import Path

import pytest

import sparse_rtrl

PACKAGE = Path(sparse_rtrl.__file__).parent
SHAPE = re.compile(
    r"\((?:[\w*'. +>-]+(?:, ?[\w*'. +>-]+)*,?)?\)"
    r"|\b0-dim\b|\bscalar\b|\bnumbers?\b|any shapes?|own shapes?|equal shapes?"
    r"|groups\.all|groups\.core|shaped like|shape of|(?:from|as|as for|as in|see) :\w+:`"
)
"""``(B, H)``, or words that say the same: a number, any shape, a parameter's own shape, or where it is said."""
PATHS = [p for p in sorted(PACKAGE.rglob("*.py")) if "triton_kernels" not in p.parts and not p.name.startswith("_")]


def is_tensor(annotation):
    return annotation is not None and re.search(r"\b(Tensor|State)\b", ast.unparse(annotation)) is not None


def decorators(function):
    return {ast.unparse(decorator) for decorator in function.decorator_list}


def functions(tree):
    """Public functions and methods, with the docstring of the class for ``__init__``."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (
                    not method.name.startswith("_") or method.name == "__call__"
                ):
                    yield method, ast.get_docstring(method) or ""


def says_no_shape(function, doc):
    """What of a function takes or gives a tensor of a shape that its docstring does not say."""
    if re.search(r"[Ss]ee :(meth|attr|class|func):", doc.partition("\n\n")[0]) or "overload" in decorators(function):
        return []
    wanted = [a.arg for a in (*function.args.args, *function.args.kwonlyargs) if is_tensor(a.annotation)]
    sections = {
        m[1]: m[2] for m in re.finditer(r"^(Args|Returns|Yields):\n((?:    .*\n?|\n)+)", doc + "\n", re.MULTILINE)
    }
    head = doc.partition("\n\n")[0]
    missing = []
    for name in wanted:
        entry = re.search(rf"^    \*?{name}:((?:.*\n)(?:        .*\n)*)", sections.get("Args", ""), re.MULTILINE)
        if not SHAPE.search(entry[1] if entry else head):
            missing.append(name)
    if is_tensor(function.returns) and not SHAPE.search(
        sections.get("Returns", "") + sections.get("Yields", "") + head
    ):
        missing.append("what it returns")
    return missing


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_docstrings_say_the_shapes_of_tensors(path):
    found = {f.name: missing for f, doc in functions(ast.parse(path.read_text())) if (missing := says_no_shape(f, doc))}
    assert found == {}
