"""How the tests are laid out: what two test modules need lies in ``helpers``, and ``conftest.py`` holds fixtures alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def imported(path: Path) -> set[str]:
    """The first parts of the names of all modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.name)
def test_nobody_imports_a_test_module_or_conftest(path):
    others = {other.stem for other in TESTS.glob("test_*.py")} | {"conftest"}
    assert not imported(path) & others


def test_conftest_defines_fixtures_alone():
    functions = [
        node for node in ast.parse((TESTS / "conftest.py").read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert functions
    for function in functions:
        assert any("fixture" in ast.unparse(decorator) for decorator in function.decorator_list), function.name
