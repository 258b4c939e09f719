"""Try every method of the installed PEFT on tiny backbones of ten families, and write what works.

A cell says whether a method trains (every trainable tensor receives a gradient, and the loss falls
in three steps of AdamW), whether it merges (largest difference of the outputs), whether a saved
folder comes back bit for bit, and what plain PEFT makes of that folder. Rows are kept as they come;
a run that was interrupted goes on.

    python -m benchmarks.peft_support
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.errors import PeftVisionError
from peft_vision.method import filed, offered
from tests.families import build, features, images

TARGET = Path(__file__).with_name("peft_support.json")
FAMILIES = (
    *("timm_vit", "timm_deit3", "timm_eva02_small", "timm_siglip", "hf_vit", "hf_dinov2"),
    *("hf_dinov3", "hf_clip", "hf_siglip", "generic_cnn"),
)
SEED, STEPS, RATE, SAME = 0, 3, 1e-3, 1e-4
NOTE = (
    "Tiny random models (4 blocks, 32 wide), float32, PEFT's defaults, all linears and the "
    "classifier trained; a merged model agrees where outputs differ by less than 1e-4 of their size"
)


def row(method: str, family: str) -> dict[str, Any]:
    """What became of one method on one family."""
    base = build(family, seed=SEED)
    dense, x = copy.deepcopy(base), images(base)
    torch.manual_seed(SEED)
    try:
        adapted = pv.wrap(base, method, data=[(images(base, 32), torch.zeros(32))])
    except PeftVisionError as error:
        return {"refused": str(error)}
    before = features(dense(x))
    start = difference(features(adapted.eval()(x)), before)
    result = {"starts_as_base": start < SAME, **trained(adapted, x, before)}
    with torch.no_grad():
        now = features(adapted.eval()(x))
        result |= {"merges": merged(adapted, x, now), **reloaded(adapted, dense, x, now)}
    return result


def trained(model: Any, x: Tensor, before: Tensor) -> dict[str, Any]:
    """Three steps towards a random target."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=RATE)
    target = torch.randn(before.shape, generator=torch.Generator().manual_seed(SEED))
    model.train()
    losses, silent = [], 0
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        loss = (features(model(x)) - target).square().mean()
        torch.autograd.backward(loss)
        silent = max(silent, sum(p.grad is None for p in wanted))
        losses.append(loss.item())
        if len(losses) <= STEPS:
            optimizer.step()
    share = sum(p.numel() for p in wanted) / sum(p.numel() for p in model.parameters())
    return {
        "tensors": len(wanted),
        "share": round(share, 4),
        "silent": silent,
        "losses": [round(loss, 5) for loss in losses],
        "trains": silent == 0 and losses[-1] < losses[0],
    }


def merged(model: Any, x: Tensor, now: Tensor) -> float | str:
    """Largest difference after merging, as a share of the outputs' size, or why there is none."""
    try:
        return difference(features(pv.merge(model).eval()(x)), now)
    except PeftVisionError as error:
        return str(error)


def reloaded(model: Any, dense: nn.Module, x: Tensor, now: Tensor) -> dict[str, Any]:
    """The folder opened again, by this package and by plain PEFT."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        model.save_pretrained(folder)
        torch.manual_seed(SEED + 1)
        again = features(pv.load(folder, base=dense)(x))
        try:
            plain = peft.PeftModel.from_pretrained(copy.deepcopy(dense), str(folder)).eval()
            other: float | str = difference(features(plain(x)), now)
        except (KeyError, RuntimeError, ValueError) as error:
            other = str(error)
    return {"reloads": torch.equal(again, now), "plain": other}


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference as a share of the size of the outputs, or of 1 where they are small."""
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


def main() -> None:
    """Write the rows beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    fresh = parser.parse_args().fresh
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = {} if fresh or not TARGET.is_file() else json.loads(TARGET.read_text())["rows"]
    names = sorted(set(offered()) - set(filed()))
    rows: dict[str, dict[str, Any]] = {name: known.get(name, {}) for name in names}
    begun = time.perf_counter()
    for family in FAMILIES:
        for name in names:
            rows[name][family] = rows[name].get(family) or row(name, family)
        write(rows)
        print(f"{family}: {time.perf_counter() - begun:.0f} s", flush=True)


def write(rows: dict[str, Any]) -> None:
    """The file, whole or not at all."""
    content = {
        "note": NOTE,
        "machine": f"{platform.machine()}, 1 thread",
        "versions": {name: version(name) for name in ("peft", "torch", "timm", "transformers")},
        "seed": SEED,
        "families": FAMILIES,
        "rows": rows,
    }
    stage = TARGET.with_suffix(".tmp")
    stage.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    stage.replace(TARGET)


if __name__ == "__main__":
    main()
