"""extras/: what the scripts there share. They run as modules, and nothing of the top level needs them."""
import ast

import pytest

from conftest import ROOT, run

SCRIPTS = [path.stem for path in sorted(ROOT.glob("extras/*.py")) if "__main__" in path.read_text("utf-8")]


def imported(path):
    """The names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_top_level_imports_nothing_of_extras():
    found = {path.name: set(imported(path)) for path in ROOT.glob("*.py")}
    assert "model" in found["pretrain.py"] and len(found) > 9
    assert not [name for name, modules in found.items() if any(m.split(".")[0] == "extras" for m in modules)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_usage_names_the_command_that_runs_it(name, tmp_path):
    helped = run(f"extras.{name}", tmp_path, "--help")
    assert helped.rc == 0 and f"python -m extras.{name}" in helped.out and "--out=" in helped.out, helped.err
    wrong = run(f"extras.{name}", tmp_path, "--xyzxyz=1")
    assert wrong.rc == 1 and wrong.err.count("\n") == 1
    assert f"see python -m extras.{name} --help" in wrong.err
