"""The house rules: imports point one way, scripts stay at the top, files stay short."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

SIX = ("trsr", "llama", "lora", "summarize", "evaluate", "train")
SCRIPTS = {"summarize", "evaluate", "train"}
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests", "build"} & set(path.relative_to(ROOT).parts)
)


def part_of(path):
    """The package of a file, or for one of the six the file itself."""
    first, *rest = path.relative_to(ROOT).parts
    return first if rest else Path(first).stem


def has_main(path):
    return 'if __name__ == "__main__":' in path.read_text() or path.stem == "__main__"


def imported(path):
    """The project's own modules that a file imports, wherever in the file."""
    own = {part_of(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            if name.split(".")[0] in own:
                yield name


def arrows():
    """For each part the parts that it imports."""
    found = {part_of(path): set() for path in FILES}
    for path in FILES:
        found[part_of(path)] |= {name.split(".")[0] for name in imported(path)} - {part_of(path)}
    return found


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_no_part_imports_one_that_imports_it():
    graph = arrows()
    order = []
    while len(order) < len(graph):
        free = [part for part in graph if part not in order and graph[part] <= set(order)]
        assert free, f"a loop among {sorted(set(graph) - set(order))}"
        order += free
    assert set(SIX) <= set(order)


def test_what_lies_below_the_model_imports_nothing_of_the_project():
    graph = arrows()
    assert graph["ops"] == set()
    assert graph["trsr"] == graph["lora"] == set()
    assert graph["llama"] == {"ops"}


def test_only_scripts_import_scripts():
    for path in FILES:
        if not has_main(path):
            assert not SCRIPTS & {name.split(".")[0] for name in imported(path)}, path


def test_the_top_level_holds_the_six_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SIX)
    for package in {part_of(path) for path in FILES} - set(SIX):
        words = (
            ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or ""
        ).split()
        assert len(words) > 5, f"{package}/__init__.py does not say what belongs there"


def test_the_six_stay_short():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in SIX}
    assert max(lines.values()) <= 500
    assert sum(lines.values()) <= 2400


@pytest.mark.parametrize("name", SIX)
def test_functions_of_the_six_fit_on_a_screen(name):
    for node in functions(ROOT / f"{name}.py"):
        arguments = [a.arg for a in node.args.args if a.arg not in ("self", "cls", "ctx")]
        assert node.end_lineno - node.lineno < 40, node.name
        assert len(arguments) <= 6, node.name


def test_command_lines_end_at_the_scripts():
    """No function outside of a script takes a parsed command line."""
    for path in FILES:
        if not has_main(path):
            for node in functions(path):
                assert "args" not in {a.arg for a in node.args.args}, f"{path}: {node.name}"
