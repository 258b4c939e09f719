"""The package as files: what the contract tests walk over."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "peft_vision"
METHOD_KINDS = ("adapters", "pruners", "decomposers", "quantizers", "heads")


def source_files() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def method_files() -> list[Path]:
    """Every file that is a method: a public stem in one of the folders of methods."""
    return [
        file
        for kind in METHOD_KINDS
        for file in sorted((PACKAGE / kind).glob("*.py"))
        if not file.stem.startswith("_")
    ]


def where(file: Path) -> str:
    """The path as a person would write it."""
    return file.relative_to(ROOT).as_posix()


def module_name(file: Path) -> str:
    """`peft_vision/cli/__init__.py` is `peft_vision.cli`."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def syntax(file: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported_modules(node: ast.AST, modules: frozenset[str]) -> list[str]:
    """Modules of the package that one import statement names; other nodes name none."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in modules]
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return []
    if [alias.name for alias in node.names] == ["__version__"]:
        return []  # a constant, not a dependency
    submodules = [f"{node.module}.{alias.name}" for alias in node.names]
    found = [name for name in submodules if name in modules]
    whole_package_needed = len(found) < len(submodules)
    if whole_package_needed and node.module in modules:
        found.append(node.module)
    return found


@cache
def import_graph() -> dict[str, frozenset[str]]:
    """Module -> modules of the package that it imports, anywhere in the file."""
    names = {module_name(file): file for file in source_files()}
    modules = frozenset(names)
    return {
        name: frozenset(
            target
            for node in ast.walk(syntax(file))
            for target in imported_modules(node, modules)
            if target != name
        )
        for name, file in names.items()
    }


def runs_on_import(tree: ast.Module) -> list[ast.stmt]:
    """Import statements that run when the module is loaded: not in functions, not for typing."""
    found: list[ast.stmt] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.append(node)
            elif not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                waiting.append(node)
    return found


def in_functions(tree: ast.Module) -> list[ast.stmt]:
    """Import statements that run when a function is called."""
    return [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


@cache
def loaded_with(module: str) -> frozenset[str]:
    """Third-party packages that loading a module of ours loads, through other modules too."""
    names = {module_name(file): file for file in source_files()}
    modules, done, packages = frozenset(names), set(), set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        for node in runs_on_import(syntax(names[name])):
            ours = imported_modules(node, modules)
            waiting += ours
            if not ours and isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif not ours and isinstance(node, ast.ImportFrom) and node.module:
                packages.add(node.module.split(".")[0])
    return frozenset(packages)
