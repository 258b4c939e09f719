"""Predicted memory of the recipes for one 24 GB GPU, and what predicting it takes.

    python -m benchmarks.predicted_memory

Each recipe is one run of `peft-vision memory` in a process of its own, on one thread.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_vision.recipe import shipped

TARGET = Path(__file__).with_suffix(".json")
GIB = 2**30


def predicted(name: str) -> dict[str, Any]:
    """What the verb says, in how many seconds, and how much it held itself."""
    command = [sys.executable, "-m", "peft_vision", "memory", name, "--json", "--gpu", "24GB"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    code = "import resource, subprocess, sys; p = subprocess.run(sys.argv[1:], check=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env=settings,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    found: dict[str, Any] = json.loads(lines[-2])
    seconds = time.perf_counter() - start
    return {**found, "name": name, "seconds": seconds, "host_bytes": int(lines[-1]) * 1024}


def row(found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    height, width = found["image_size"]
    return [
        f"`{found['name']}`",
        f"{height} x {width}",
        str(found["micro_batch"]),
        f"{found['allocated'] / GIB:.1f}",
        f"{found['peak'] / GIB:.1f}",
        str(found["largest"]),
        f"{found['seconds']:.0f} s, {found['host_bytes'] / GIB:.1f} GiB",
    ]


def main() -> None:
    """Predict every recipe and write the table."""
    cells = []
    for name in [name for name in shipped() if name.endswith("-24gb")]:
        cells.append(predicted(name))
        print(row(cells[-1]), flush=True)
        write(cells)


def write(cells: list[dict[str, Any]]) -> None:
    """The figures so far."""
    content = {
        "columns": [
            "recipe",
            "pixels",
            "images per pass",
            "tensors, GiB",
            "with overhead, GiB",
            "largest pass in 24 GB",
            "predicted in",
        ],
        "rows": [row(cell) for cell in cells],
        "note": "Fake tensors, no GPU: none of it was measured on one. The last column is the time "
        "of the whole command with its advice, on one thread of a machine with other work, and the "
        "memory that it held itself",
        "machine": f"{platform.machine()}, 1 thread",
        "seed": None,
        "versions": {name: version(name) for name in ("torch", "timm", "peft")},
        "cells": cells,
    }
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
