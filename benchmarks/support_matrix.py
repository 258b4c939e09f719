"""What works on which backbone: every module family of timm, and transformers' vision backbones.

Per family the smallest model, with random weights: seen as sites; LoRA steps with a gradient shown
in every adapter; saved and loaded; compressed to 0.6 of the FLOPs with the default methods; saved
and loaded bit for bit; written as ONNX and run by ONNX Runtime for three batch sizes. A cell is
"yes" or the reason. Families that the file has are left as they are: a run that was cut short goes
on.

    python -m benchmarks.support_matrix            # about an hour on two cores
    python -m benchmarks.support_matrix --again timm/swin_transformer
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import multiprocessing
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_vision as pv
from benchmarks.support_models import (
    build_timm,
    build_transformers,
    image_size_of,
    smallest_of,
    timm_families,
    transformers_families,
)
from peft_vision.backbones import view
from peft_vision.errors import PeftVisionError
from peft_vision.tracing import tensor_of

TARGET = Path(__file__).with_suffix(".json")
TARGET_FLOPS, LIMIT_S, SEED = 0.6, 600, 0
STEPS_TAKEN = 4
STEPS = ("lora", "save", "compress", "reload", "onnx")


def random_images(model: nn.Module, batch: int = 2) -> Tensor:
    """Normal noise, B 3 H W."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(batch, 3, *image_size_of(model), generator=generator)


@torch.no_grad()
def answer(model: nn.Module, images: Tensor) -> Tensor:
    """What the model says in evaluation mode."""
    return tensor_of(model.eval()(images))[1]


def build(provider: str, family: str, name: str | None) -> tuple[str, nn.Module]:
    """The model of a row, and what it is called."""
    torch.manual_seed(SEED)
    if provider == "timm":
        chosen = name or smallest_of(family)
        return chosen, awake(build_timm(chosen))
    model = build_transformers(family)
    return type(model).__name__, awake(model)


def awake(model: nn.Module) -> nn.Module:
    """Random values where an initialization put zeros, as pretrained weights have none there.

    A residual branch whose last scale is 0 passes no gradient to what is in it.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.3)
    return model.eval()


def row(provider: str, family: str, name: str | None) -> dict[str, Any]:
    """Every cell of one family."""
    found: dict[str, Any] = {"provider": provider, "family": family}
    start = time.perf_counter()
    try:
        found["model"], model = build(provider, family, name)
    except ValueError as error:
        return {**found, "model": "", "refused": str(error)}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found |= seen(model)
    with tempfile.TemporaryDirectory() as folder:
        found |= adapted(copy.deepcopy(model), Path(folder) / "adapter")
        found |= compressed(model, Path(folder) / "compressed")
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def seen(model: nn.Module) -> dict[str, Any]:
    """How the model is understood."""
    backbone = view(model)
    kinds = ("blocks", "heads", "hidden", "linears", "convs")
    sites = {kind: len(getattr(backbone, kind)) for kind in kinds}
    sites["tokens"] = int(backbone.tokens is not None)
    return {"view": backbone.family, "sites": sites, "missing": dict(backbone.missing)}


def adapted(base: nn.Module, folder: Path) -> dict[str, str]:
    """LoRA: one step that moves every adapter, then saved and loaded."""
    dense, images, size = copy.deepcopy(base), random_images(base), image_size_of(base)

    model, why = attempt(lambda: pv.wrap(base, "lora", r=4, image_size=size))
    if model is None:
        return {"lora": why, "save": "-"}
    moved, why = attempt(lambda: stepped(model, images))

    def save() -> str:
        model.save_pretrained(folder)
        again = pv.load(folder, base=dense)
        return same(answer(model, images), answer(again, images))

    said, unsaved = attempt(save)
    return {"lora": why or moved, "save": unsaved or said}


def stepped(model: Any, images: Tensor) -> str:
    """A few steps of Adam: every trained tensor has to get a gradient other than zero.

    In LoRA, A gets one only once B has moved; and stochastic depth may pass a block by in a step.
    """
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    silent = set(wanted)
    optimizer = torch.optim.Adam(wanted.values(), lr=1e-3)
    model.train()
    for _ in range(STEPS_TAKEN):
        optimizer.zero_grad()
        torch.autograd.backward(tensor_of(model(images))[1].square().mean())
        silent -= {n for n, p in wanted.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    model.eval()
    return "yes" if not silent else f"{len(silent)} of {len(wanted)} silent: {min(silent)}"


def compressed(model: nn.Module, folder: Path) -> dict[str, Any]:
    """To 0.6 of the FLOPs with the default methods, saved, loaded, written as ONNX."""
    model, images, size = model.eval(), random_images(model), image_size_of(model)
    start = time.perf_counter()
    result, why = attempt(lambda: pv.compress(model, target_flops=TARGET_FLOPS, image_size=size))
    if result is None:
        return {"compress": why, "reload": "-", "onnx": "-"}
    found: dict[str, Any] = {
        "compress": "yes",
        "got": round(result.ratio, 4),
        "methods": sorted({step.method for step in result.plan.steps}),
        "compress_s": round(time.perf_counter() - start, 1),
    }

    def reload() -> str:
        source = result.model.history.source
        result.model.save_pretrained(folder)
        again = pv.load(folder, base=None if source else model)
        return same(answer(result.model, images), answer(again, images))

    def onnx() -> str:
        pv.export(result.model, folder.with_suffix(".onnx"), image_size=size)
        return "yes"

    for name, step in (("reload", reload), ("onnx", onnx)):
        said, why = attempt(step)
        found[name] = why or said
    return found


def same(one: Tensor, other: Tensor) -> str:
    """Whether a reloaded model says the same to the bit."""
    if torch.equal(one, other):
        return "yes"
    return f"differs by {float((one - other).abs().max()):.1e}"


def attempt(step: Callable[[], Any]) -> tuple[Any, str]:
    """What a step gives, and why it gives nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return step(), ""
    except PeftVisionError as error:
        return None, first_sentence(str(error))
    except Exception as error:  # noqa: BLE001 - the table says what is broken, whatever it is
        return None, f"broken: {type(error).__name__}: {first_sentence(str(error))}"


def first_sentence(text: str) -> str:
    """At most 200 characters, without line ends."""
    line = " ".join(text.split())
    return re.split(r"(?<=[a-z)])\. (?=[A-Z])", line)[0][:200]


def answered(sender: Any, job: tuple[str, str, str | None]) -> None:
    """What the process does."""
    torch.set_num_threads(1)
    sender.send(row(*job))


def isolated(job: tuple[str, str, str | None]) -> dict[str, Any]:
    """A row in a process of its own: what hangs or crashes is a row that says so."""
    provider, family, name = job
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=answered, args=(sender, job))
    child.start()
    sender.close()
    found: dict[str, Any] = {"provider": provider, "family": family, "model": name or ""}
    if not receiver.poll(LIMIT_S):
        child.kill()
        return {**found, "refused": f"not done after {LIMIT_S} s"}
    try:
        found = receiver.recv()
    except EOFError:
        child.join()
        found["refused"] = f"the process ended with code {child.exitcode}"
    child.join()
    return found


def main() -> None:
    """Fill in the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", nargs="*", default=[], help="rows to make anew, provider/family")
    parser.add_argument(
        "--broken", action="store_true", help="make anew what has a cell without yes"
    )
    parser.add_argument("--only", nargs="*", help="provider/family")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=TARGET)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("timm", "transformers", "peft", "onnxscript", "onnxruntime"):
        importlib.import_module(name)  # once for all processes
    rows = {}
    if asked.output.is_file():
        rows = {key(r): r for r in json.loads(asked.output.read_text())["cells"]}
    families = [("timm", f) for f in timm_families()]
    families += [("transformers", f) for f in transformers_families()]
    again = {*asked.again, *((k for k, r in rows.items() if not whole(r)) if asked.broken else ())}
    jobs = [
        (provider, family, rows.get(f"{provider}/{family}", {}).get("model") or None)
        for provider, family in families
        if (asked.only is None or f"{provider}/{family}" in asked.only)
        and (f"{provider}/{family}" not in rows or f"{provider}/{family}" in again)
    ]
    with ThreadPoolExecutor(asked.workers) as pool:
        for found in pool.map(isolated, jobs):
            rows[key(found)] = found
            print(json.dumps({k: v for k, v in found.items() if k != "missing"}), flush=True)
            write(asked.output, [rows[f"{p}/{f}"] for p, f in families if f"{p}/{f}" in rows])


def key(found: dict[str, Any]) -> str:
    """provider/family."""
    return f"{found['provider']}/{found['family']}"


def whole(found: dict[str, Any]) -> bool:
    """Whether every cell says yes."""
    return all(found.get(step) == "yes" for step in STEPS)


def write(target: Path, cells: list[dict[str, Any]]) -> None:
    """The rows so far."""
    content = {
        "machine": platform.machine(),
        "seed": SEED,
        "versions": {
            n: version(n) for n in ("torch", "timm", "transformers", "peft", "onnxruntime")
        },
        "target_flops": TARGET_FLOPS,
        "cells": cells,
    }
    beside = target.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(target)


if __name__ == "__main__":
    main()
