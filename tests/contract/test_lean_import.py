"""`import peft_vision` and `peft-vision --help` answer before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.contract.tree import ROOT

HEAVY = (
    "accelerate", "bitsandbytes", "datasets", "jinja2", "matplotlib", "onnx", "onnxruntime",
    "onnxscript", "peft", "sklearn", "timm", "torchvision", "transformers",
)  # fmt: skip
# Imports in a fresh interpreter and prints which top-level packages that loaded.
PROBE = (
    "import json, sys; {code}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
)


def fresh(*arguments: str) -> str:
    """Run Python in a process of its own and return what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """Top-level packages in `sys.modules` after running `code` in a fresh interpreter."""
    return set(json.loads(fresh("-c", PROBE.format(code=code)).splitlines()[-1]))


def test_the_probe_can_see_a_heavy_package() -> None:
    assert "yaml" in loaded_by("import yaml")
    assert "yaml" not in loaded_by("pass")


def test_import_loads_nothing_heavy() -> None:
    assert not loaded_by("import peft_vision").intersection(HEAVY)


def test_import_does_not_touch_cuda() -> None:
    code = (
        "import peft_vision, sys; torch = sys.modules.get('torch'); "
        "print(bool(torch and torch.cuda.is_initialized()))"
    )
    assert fresh("-c", code).strip() == "False"


def test_command_line_is_built_without_torch() -> None:
    code = "import typer.main, peft_vision.cli as cli; typer.main.get_command(cli.app)"
    assert not loaded_by(code).intersection({*HEAVY, "torch"})


@pytest.mark.parametrize("arguments", [(), ("finetune",), ("compress",)], ids=" ".join)
def test_help_answers_quickly(arguments: tuple[str, ...]) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert "Usage" in fresh("-m", "peft_vision", *arguments, "--help")
        seconds.append(time.perf_counter() - start)
    # Under a second on an idle machine; tests share theirs, and loading torch alone takes longer.
    assert min(seconds) < 3.0


def test_every_public_name_is_there() -> None:
    code = (
        "import peft_vision as pv; missing = [n for n in pv.__all__ if getattr(pv, n) is None]; "
        "assert not missing, missing; assert set(pv.__all__) <= set(dir(pv)); "
        "print(len(pv.__all__))"
    )
    assert int(fresh("-W", "default", "-c", code).splitlines()[-1]) >= 8


def test_public_functions_are_not_hidden_by_modules_of_the_same_name() -> None:
    """Importing `package.name` puts the module into the package under `name`."""
    code = (
        "import importlib, types, peft_vision as pv; "
        "names = [n for n in pv.__all__ if n not in ('__version__', 'errors', 'tracking')]; "
        "[importlib.import_module(getattr(pv, n).__module__) for n in names]; "
        "print([n for n in names if isinstance(getattr(pv, n), types.ModuleType)])"
    )
    assert fresh("-W", "default", "-c", code).splitlines()[-1] == "[]"
