"""The shape of the code base: who may import what, and that everything public is documented."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnxfuse

PACKAGE = Path(onnxfuse.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ONLY = {
    "onnx_graphsurgeon": ["graph/edits.py"],
    "ot": ["transport/solvers.py"],
    "onnxruntime": ["proof/runtime.py"],
    "cyclopts": ["cli/"],
    "rich": ["cli/"],
}
NUMERICS = ["arrays.py", "fusion/maps.py", "fusion/methods/", "importance/", "statistics/", "transport/"]


def place(file: Path) -> str:
    """Return a file's path inside the package."""
    return file.relative_to(PACKAGE).as_posix()


def inside(file: str, places: list[str]) -> bool:
    """Return whether a file is one of the places, or in one that is a folder."""
    return any(file == p or (p.endswith("/") and file.startswith(p)) for p in places)


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of everything that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(tree: ast.Module) -> set[str]:
    """Return the packages that a module imports from."""
    return {name.split(".")[0] for name in imports(tree)}


def prints(tree: ast.Module) -> list[int]:
    """Return the lines that call print."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def undocumented(tree: ast.Module) -> list[str]:
    """Return the names of public classes and functions without a docstring; methods count, nested functions don't."""
    found = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            members = node.body if isinstance(node, ast.ClassDef) else []
            documentable = [node, *(m for m in members if isinstance(m, ast.FunctionDef | ast.ClassDef))]
            found += [m.name for m in documentable if not m.name.startswith("_") and not ast.get_docstring(m)]
    return found


def tree_of(file: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


EXAMPLE = '''
"""A module."""
import onnx.helper
from rich import table

def documented():
    """Do something."""
    def nested(): print("inside")

def bare(): ...

class Bare:
    def method(self): ...
    def _private(self): import ot
'''


def test_the_checks_can_fail() -> None:
    """The checks can fail."""
    tree = ast.parse(EXAMPLE)
    assert packages(tree) == {"onnx", "rich", "ot"}
    assert set(imports(tree)) == {"onnx.helper", "rich", "rich.table", "ot"}
    assert prints(tree) == [8]
    assert undocumented(tree) == ["bare", "Bare", "method"]
    assert undocumented(ast.parse("x = 1")) == ["the module"]
    assert inside("cli/app.py", ["cli/"])
    assert not inside("graph/edits_more.py", ["graph/edits.py"])


def test_there_are_files_to_check() -> None:
    """There are files to check."""
    assert len(FILES) > 40
    assert all(any(inside(place(file), places) for file in FILES) for places in ([p] for p in NUMERICS))


@pytest.mark.parametrize("package", ONLY)
def test_a_package_is_imported_in_one_place(package: str) -> None:
    """A package is imported in one place."""
    users = [place(file) for file in FILES if package in packages(tree_of(file))]
    assert users
    assert [user for user in users if not inside(user, ONLY[package])] == []


def test_numerics_know_no_onnx() -> None:
    """Numerics know no onnx."""
    numerics = [file for file in FILES if inside(place(file), NUMERICS)]
    found = {place(file): packages(tree_of(file)) & {"onnx", "onnxruntime", "onnx_graphsurgeon"} for file in numerics}
    assert {name: names for name, names in found.items() if names} == {}
    own = {place(file): [name for name in imports(tree_of(file)) if name.startswith("onnxfuse.")] for file in numerics}
    layers = ("graph", "coupling", "proof", "planning", "pipeline", "report", "cli", "config", "analysis")
    forbidden = tuple(f"onnxfuse.{layer}" for layer in layers)
    assert {file: names for file, names in own.items() if any(name.startswith(forbidden) for name in names)} == {}


def test_nothing_imports_the_command_line() -> None:
    """Nothing imports the command line."""
    users = [place(file) for file in FILES if any(name.startswith("onnxfuse.cli") for name in imports(tree_of(file)))]
    assert [user for user in users if not user.startswith("cli/")] == ["__main__.py"]


@pytest.mark.parametrize("file", FILES, ids=place)
def test_a_module_prints_nothing_and_documents_what_is_public(file: Path) -> None:
    """A module prints nothing and documents what is public."""
    tree = tree_of(file)
    assert prints(tree) == []
    assert undocumented(tree) == []


def test_the_public_names_are_there_and_documented() -> None:
    """The public names are there and documented."""
    assert sorted(onnxfuse.__all__) == list(onnxfuse.__all__)
    for name in onnxfuse.__all__:
        assert (inspect.getdoc(getattr(onnxfuse, name)) or "").strip(), name


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "__main__"], ids=place)
def test_what_a_module_exports_is_in_it(file: Path) -> None:
    """What a module exports is in it."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    exported = getattr(module, "__all__", [])
    assert [name for name in exported if not hasattr(module, name)] == []
    assert len(set(exported)) == len(exported)


def loaded_by(statement: str) -> set[str]:
    """Return the packages that a statement has imported in an interpreter of its own."""
    code = f"import sys; {statement}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("statement", ["import onnxfuse", "import onnxfuse.cli", "import onnxfuse; dir(onnxfuse)"])
def test_the_package_is_there_before_what_it_needs(statement: str) -> None:
    """The package is there before what it needs."""
    heavy = {"numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "scipy", "sklearn", "ot", "cyclopts", "rich"}
    assert loaded_by(statement) & heavy == set()
    assert {"numpy", "onnx"} <= loaded_by("import onnxfuse; onnxfuse.compress")


def test_the_command_line_answers_before_it_solves() -> None:
    """The command line answers before it solves."""
    slow = {"scipy", "sklearn", "ot", "PIL"}
    assert loaded_by("from onnxfuse.cli import main; main(['compress', '--help'])") & slow == set()
    solve = "from onnxfuse.transport import SOLVERS; import numpy as np; x = np.ones(1); "
    assert "ot" in loaded_by(f"{solve}SOLVERS['exact'](x[:, None], x, x, regularisation=1.0)")


def test_names_that_are_not_imported_yet_are_listed_and_those_that_are_not_there_refused() -> None:
    """Names that are not imported yet are listed, and those that are not there refused."""
    code = "import onnxfuse; assert set(onnxfuse.__all__) <= set(dir(onnxfuse)); from onnxfuse import *; compress, Plan"
    assert "onnx" in loaded_by(code)
    loaded_by("import onnxfuse; onnxfuse.errors.ModelError; onnxfuse.pipeline.compress")
    misspelt = "compres"
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        getattr(onnxfuse, misspelt)
