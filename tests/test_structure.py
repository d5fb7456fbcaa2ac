"""The rooms of the house: imports run one way, from the top floor down."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxtemporal
from fxtemporal.support.torch_private import needed

ROOT = Path(fxtemporal.__file__).parent
FLOORS = """
    support ir verification capture functional analysis nn passes mistakes tuning reports
    factorization compiler api lowering cli
""".split()


def modules() -> dict[str, Path]:
    """Every module by its path below ``fxtemporal``: ``passes.rule``."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """What ``path`` imports of the package: inside of functions, and for types alone, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                n if n.removeprefix("fxtemporal.") in known else str(node.module) for n in names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("fxtemporal."):
                yield name.removeprefix("fxtemporal.")


def test_no_import_runs_upwards() -> None:
    known = modules()
    upward = [
        f"{module} imports {target}"
        for module, path in known.items()
        if module.partition(".")[0] in FLOORS
        for target in imported(path, set(known))
        if FLOORS.index(target.partition(".")[0]) > FLOORS.index(module.partition(".")[0])
    ]
    assert not upward


def test_no_imports_run_in_a_circle() -> None:
    known = modules()
    graph = {module: {*imported(path, set(known))} - {module} for module, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_compiler_names_no_pass() -> None:
    machinery = {"rule", "pipeline", "dump", "selection"}
    known = modules()
    named = [
        f"{module} imports {target}"
        for module, path in known.items()
        if module.startswith("compiler.")
        for target in imported(path, set(known))
        if target.startswith("passes.") and target.split(".")[1] not in {*machinery, "building"}
    ]
    assert not named


def test_every_file_has_a_room() -> None:
    at_the_top = {module for module in modules() if "." not in module}
    assert at_the_top == {*FLOORS, "", "__main__"}


def private_names(path: Path) -> Iterator[str]:
    """What ``path`` names of torch that begins with an underscore."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
        elif isinstance(node, ast.ImportFrom):
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
        else:
            continue
        named = isinstance(node, ast.Attribute) and parts[0] in ("nn", "F", "forward_ad")
        private = [part for part in parts[1:] if part.startswith("_") and part[1:2] != "_"]
        classes = parts[:2] == ["nn", "Module"]  # its dictionaries of hooks
        if (parts[0] == "torch" or named) and private and not classes:
            yield ".".join(parts)


def test_private_names_of_torch_stand_in_one_place() -> None:
    named = {
        f"{module}: {name}"
        for module, path in modules().items()
        if not module.startswith("support.torch_private")
        for name in private_names(path)
    }
    assert not named


def test_contributing_lists_the_private_names() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in (ROOT / "support" / "torch_private").glob("*.py"):
        if path.stem != "__init__":
            assert f"| `{path.stem}` |" in text


def test_a_name_that_torch_no_longer_has_is_named() -> None:
    with pytest.raises(ImportError, match=r"needs torch\._C\._gone, which torch \d.* not have"):
        needed("torch._C._gone")


def test_no_test_patches_the_package_by_a_dotted_path() -> None:
    """A test that must decide what the package sees passes it in: as an argument, or as a file."""
    patches = [
        f"{path.name}:{call.lineno}: {ast.unparse(call.args[0])}"
        for path in Path(__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith((".setattr", "patch"))
        if call.args and isinstance(call.args[0], ast.Constant)
        if str(call.args[0].value).startswith("fxtemporal")
    ]
    assert not patches


def test_passes_stand_at_the_top_of_the_tree() -> None:
    assert (ROOT.parent / "passes").resolve() == ROOT / "passes"


def test_public_names_are_where_they_are_said_to_be() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    for_types = {
        alias.name: str(node.module).removeprefix("fxtemporal.")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert for_types == fxtemporal._PLACES
    assert {*fxtemporal.__all__} == {*for_types, "__version__"}
    for name in fxtemporal.__all__:
        assert getattr(fxtemporal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = fxtemporal.optimise


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_help_and_version_do_not_wait_for_torch(asked: str) -> None:
    code = (
        "import sys; sys.argv = ['fxtemporal', sys.argv[1]]\n"
        "from fxtemporal.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(status)"
    )
    ran = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "fxtemporal" in ran.stdout
