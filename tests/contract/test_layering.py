"""The shape of the source tree: imports point down, names stay at home, nothing unsafe."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.tree import (
    METHOD_KINDS,
    PACKAGE,
    ROOT,
    import_graph,
    imported_modules,
    in_functions,
    loaded_with,
    method_files,
    module_name,
    runs_on_import,
    source_files,
    syntax,
    where,
)

# From the ground up: a unit (file or folder of the package) imports its own level or lower ones.
HEIGHTS = (
    ("errors", "plan", "budget", "lookup", "files"),
    ("layers",),
    ("sources", "backbones"),
    ("method", "cost", "proof", "calibration", "applying"),
    (*METHOD_KINDS, "presets"),
    ("tasks", "data", "streams", "compensation"),
    ("history", "card", "artifact", "hub", "tracing", "exporting", "report", "training"),
    ("importance",),
    ("adapted", "several", "compressed", "wrapping", "loading", "merging"),
    ("search", "pricing", "mixing", "choosing", "result"),
    ("compression", "evaluation", "mask_training", "recovery", "tracking"),
    ("recipe",),
    ("memory",),
    ("finetuning", "quickstart"),
    ("cli",),
    ("__init__", "__main__"),
)
LEVELS = {unit: level for level, units in enumerate(HEIGHTS) for unit in units}
ROOMS_WITHOUT_A_NAME = {"utils", "helpers", "common", "base", "core", "registry", "misc"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAX_LINES = 400
# What takes long to load, and may therefore be loaded late.
HEAVY = {
    *("accelerate", "bitsandbytes", "datasets", "jinja2", "matplotlib", "numpy", "onnx", "peft"),
    *("onnxruntime", "onnxscript", "pydantic", "sklearn", "timm", "torch", "torchvision"),
    *("transformers", "huggingface_hub"),
}
# These two look modules up when asked to, so that help and `import peft_vision` stay quick.
LAZY = ("peft_vision", "peft_vision.cli")
# A stem is also an ordinary word, and these files mean the word.
HOMONYMS = {
    "svd": {"peft_vision/pruners/_query_spectra.py"},  # what torch calls the computation
    "magnitude": {
        "peft_vision/data/preprocessing.py",  # the strength of RandAugment, in torchvision's words
        "peft_vision/data/settings.py",  # the same
        "peft_vision/adapters/lora.py",  # PEFT's name for DoRA's vector
    },
    "lora": {  # PEFT's names of its classes, tensors and settings
        "peft_vision/adapted.py",
        "peft_vision/adapters/_explained_variance.py",
        "peft_vision/adapters/_lean.py",
        "peft_vision/adapters/_refusals.py",
        "peft_vision/adapters/_variants.py",
        "peft_vision/training/optimizers.py",
    },
}

every_file = pytest.mark.parametrize("file", source_files(), ids=where)


def unit(module: str) -> str:
    """The file or folder right below the package that a module lives in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_the_walk_finds_the_package() -> None:
    assert len(source_files()) >= 15, "the tests below would pass on an empty list"
    assert len(method_files()) >= 3


def test_every_unit_has_a_level() -> None:
    missing = {unit(name) for name in import_graph()} - set(LEVELS)
    assert not missing, f"say at which height they stand, in HEIGHTS above: {sorted(missing)}"


def test_imports_point_down() -> None:
    upward = [
        f"{name} (level {LEVELS[unit(name)]}) imports {target} (level {LEVELS[unit(target)]})"
        for name, targets in import_graph().items()
        for target in targets
        if LEVELS[unit(target)] > LEVELS[unit(name)]
    ]
    assert not upward, "\n".join(upward)


def find_cycle(graph: dict[str, frozenset[str]]) -> list[str]:
    """One cycle of a directed graph, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*path, node]):
                return cycle
        done.add(node)
        return []

    for start in sorted(graph):
        if cycle := visit(start, []):
            return cycle
    return []


def test_no_cycle_between_folders() -> None:
    units: dict[str, set[str]] = {}
    for name, targets in import_graph().items():
        units.setdefault(unit(name), set()).update(unit(target) for target in targets)
    graph = {name: frozenset(targets - {name}) for name, targets in units.items()}
    assert not find_cycle(graph), " -> ".join(find_cycle(graph))


def test_no_cycle_between_files() -> None:
    """Of imports that run; an import for typing alone may look back at its caller."""
    modules = frozenset(import_graph())
    graph = {
        module_name(file): frozenset(
            target
            for statement in [*runs_on_import(syntax(file)), *in_functions(syntax(file))]
            for target in imported_modules(statement, modules)
            if target != module_name(file)
        )
        for file in source_files()
    }
    assert not find_cycle(graph), " -> ".join(find_cycle(graph))


def test_find_cycle_can_find_one() -> None:
    graph = {name: frozenset(target) for name, target in {"a": "b", "b": "c", "c": "a"}.items()}
    assert find_cycle(graph) == ["a", "b", "c", "a"]


def test_methods_do_not_know_each_other() -> None:
    methods = {module_name(file) for file in method_files()}
    known = [
        f"{name} imports {target}"
        for name in sorted(methods)
        for target in import_graph()[name] & methods
    ]
    assert not known, "\n".join(known)


@every_file
def test_file_is_short_and_has_a_name(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{where(file)} has {lines} lines; split it at a concept"
    rooms = {part.removesuffix(".py") for part in file.relative_to(PACKAGE).parts}
    assert not rooms & ROOMS_WITHOUT_A_NAME, f"{where(file)}: name it for what it does"


@every_file
def test_nothing_unpickles(file: Path) -> None:
    found = []
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in UNPICKLERS else []
            found += [
                f"{node.module}.load"
                for alias in node.names
                if node.module == "torch" and alias.name == "load"
            ]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load")
    assert not found, f"{where(file)} can run code from a file: {found}"


@every_file
def test_no_broad_except_and_no_hasattr(file: Path) -> None:
    found = []
    for node in ast.walk(syntax(file)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            if re.search(r"\b(everything|Exception|BaseException)\b", caught):
                found.append(f"line {node.lineno} catches {caught}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            found.append(f"line {node.lineno} asks hasattr; dispatch on a type or a trait")
    assert not found, f"{where(file)}: {found}"


@every_file
def test_no_unfinished_business(file: Path) -> None:
    found = re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", file.read_text(encoding="utf-8"))
    assert not found, f"{where(file)}: open an issue instead of {found}"


def local_imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) of the imports inside functions."""
    modules = frozenset(import_graph())
    for statement in in_functions(syntax(file)):
        for target in imported_modules(statement, modules):
            yield statement.lineno, target


@every_file
def test_an_import_in_a_function_puts_off_something_heavy(file: Path) -> None:
    """Where it puts off nothing, it hides a dependency, or a cycle."""
    name = module_name(file)
    if name in LAZY or name.startswith("peft_vision.cli."):
        pytest.skip("imports when asked to, so that help and `import peft_vision` are quick")
    hidden = [
        f"line {line}: {target}"
        for line, target in local_imports(file)
        if not (loaded_with(target) - loaded_with(name)) & HEAVY
    ]
    assert not hidden, f"{where(file)}: import these at the top: {hidden}"


@every_file
def test_private_names_stay_in_their_file(file: Path) -> None:
    taken = [
        f"line {node.lineno}: {node.module}.{alias.name}"
        for node in ast.walk(syntax(file))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("peft_vision")
        and node.module != ".".join(file.relative_to(ROOT).parent.parts)  # a folder's own part
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not taken, f"{where(file)}: {taken}"


def docstrings(tree: ast.Module) -> set[int]:
    """Identities of the nodes that are docstrings (a string that stands alone)."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and string literal; docstrings and comments are prose."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield line, node.value
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value


def spelling(stem: str) -> re.Pattern[str]:
    """Matches a method's name as a word, inside a snake_case name, or in CamelCase."""
    camel = "".join(part.capitalize() for part in stem.split("_"))
    return re.compile(rf"(?<![a-z0-9]){stem}(?![a-z0-9])|{camel}(?![a-z])")


def named_in(tree: ast.Module, stem: str) -> list[str]:
    """Where a tree names a method."""
    pattern = spelling(stem)
    return [f"line {line}: {text!r}" for line, text in words(tree) if pattern.search(text)]


@pytest.mark.parametrize("method", method_files(), ids=lambda file: file.stem)
def test_method_is_named_in_its_own_file_only(method: Path) -> None:
    found = {
        where(file): hits
        for file in source_files()
        if file != method
        and where(file) not in HOMONYMS.get(method.stem, set())
        and (hits := named_in(syntax(file), method.stem))
    }
    assert not found, found


@pytest.mark.parametrize(
    "code",
    ['wrap(m, "lora")', "lora = 1", "x.lora_A", "class LoraThing: ...", "def f(use_lora=1): ..."],
)
def test_a_named_method_is_noticed(code: str) -> None:
    assert named_in(ast.parse(code), "lora")


@pytest.mark.parametrize("code", ['"""about lora"""', "explorable = 1", "# lora\nx = 1"])
def test_prose_and_other_words_are_let_through(code: str) -> None:
    assert not named_in(ast.parse(code), "lora")
