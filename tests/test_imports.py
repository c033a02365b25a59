"""Imports point down only, and no two modules import each other; read from the sources, so nothing is imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cxv", "cxv_kernels")
SCRIPT_FOLDERS = ("benchmarks", "benchmarks/paper", "tools")  # scripts that import one another by their bare names

# Modules of cxv from the lowest layer to the highest. A module may import from its own layer and from those below it;
# the longest prefix that matches a module decides.
LAYERS = (
    ("cxv.errors",),
    ("cxv.checkpoint",),
    ("cxv.data", "cxv.models"),
    ("cxv.training",),
    ("cxv.export", "cxv.sharing", "cxv.hub", "cxv.timm"),
    ("cxv", "cxv.cli", "cxv.__main__"),
)
# A function imports a module of ours for one reason only: the module needs a package that may be missing.
FUNCTION_LEVEL = {
    ("cxv.__main__", "cxv.cli"),  # the exception: Ctrl-C is handled before PyTorch is imported
}


def sources():
    """Each module of ours by name: ``cxv.models.cxv``, ``tools.tune``, ``benchmarks.paper.table1``."""
    found = {}
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for folder in SCRIPT_FOLDERS:
        found |= {f"{folder.replace('/', '.')}.{path.stem}": path for path in (ROOT / folder).glob("*.py")}
    return found


SOURCES = sources()
SCRIPTS = {name.rpartition(".")[2]: name for name in SOURCES if not name.startswith(PACKAGES)}


def imported(node, module, is_package):
    """The modules of ours, and names in them, that an import statement names: absolute, also for a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
    base = ".".join([*base, *(node.module.split(".") if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def resolve(name):
    """The module of ours that an imported name is or is in, or None."""
    name = SCRIPTS.get(name.partition(".")[0], name)
    while name and name not in SOURCES:
        name = name.rpartition(".")[0]
    return name or None


def edges(text, module, is_package=False):
    """(imported module, whether a function imports it) for each import of ``text`` from a module of ours.

    Imports for type checkers alone are left out.
    """
    found = set()

    def visit(node, in_function):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported(node, module, is_package):
                target = resolve(name)
                if target not in (None, module):
                    found.add((target, in_function))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(text), False)
    return found


def import_graph():
    return {name: edges(path.read_text(), name, path.name == "__init__.py") for name, path in SOURCES.items()}


def cycles(graph):
    """Strongly connected components of more than one module (Tarjan), as sorted lists."""
    order, low, stack, components = {}, {}, [], []

    def visit(name):
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(graph.get(name, ())):
            if target not in order:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == order[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                components.append(sorted(component))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return components


GRAPH = import_graph()


def layer(module):
    """The index in LAYERS of a module of cxv: that of its longest prefix there."""
    prefixes = {prefix: i for i, layer in enumerate(LAYERS) for prefix in layer}
    while module not in prefixes:
        module = module.rpartition(".")[0]
    return prefixes[module]


def test_no_modules_import_each_other():
    """Imports within functions count, so none of them hides a circle."""
    assert cycles({name: {target for target, _ in found} for name, found in GRAPH.items()}) == []


def test_no_module_of_cxv_imports_from_a_higher_layer():
    upward = [
        f"{name} imports {target}"
        for name, found in GRAPH.items()
        for target, _ in found
        if name.startswith("cxv.") and target.partition(".")[0] == "cxv" and layer(target) > layer(name)
    ]
    assert upward == []


@pytest.mark.parametrize(
    ("package", "higher"),
    [("cxv_kernels", ("cxv", "benchmarks", "tools")), ("cxv", ("benchmarks", "tools")), ("benchmarks", ("tools",))],
)
def test_package_imports_nothing_from_above(package, higher):
    upward = [
        f"{name} imports {target}"
        for name, found in GRAPH.items()
        for target, _ in found
        if name.partition(".")[0] == package and target.partition(".")[0] in higher
    ]
    assert upward == []


def test_functions_import_only_what_may_be_missing():
    assert {(name, target) for name, found in GRAPH.items() for target, in_function in found if in_function} == (
        FUNCTION_LEVEL
    )


def test_tests_import_nothing_from_benchmarks():
    """A test starts a benchmark as a user does: `run_script` of conftest.py."""
    wrong = [
        f"{path.name} imports {target}"
        for path in (ROOT / "tests").rglob("*.py")
        for target, _ in edges(path.read_text(), path.stem)
        if target.startswith("benchmarks")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "module", "expected"),
    [
        ("from ..errors import InputError", "cxv.training.trainer", {("cxv.errors", False)}),
        (
            "from . import cxv, registry",
            "cxv.models.hybrid",
            {("cxv.models.cxv", False), ("cxv.models.registry", False)},
        ),
        ("from .models import CPV", "cxv", {("cxv.models", False)}),
        ("import cxv.training.trainer", "benchmarks.plots", {("cxv.training.trainer", False)}),
        ("from _harness import Row", "tools.tune", {("benchmarks._harness", False)}),
        ("class A:\n    def f(self):\n        from cxv import cli", "cxv_kernels.testing", {("cxv.cli", True)}),
        ("if TYPE_CHECKING:\n    from .cli import main", "cxv.export", set()),
        ("import torch, json\nfrom collections import abc", "cxv.errors", set()),
    ],
    ids=["parent", "siblings", "package", "absolute", "script", "in-a-method", "type-checking", "other-libraries"],
)
def test_imports_are_found(text, module, expected):
    """The reader of the sources itself: the tests above would also pass if it found nothing."""
    assert edges(text, module, is_package=module in PACKAGES) == expected


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f", "a"}, "f": {"e"}}
    assert cycles(graph) == [["b", "c"], ["e", "f"]]
