"""Time and memory of one training step: full fine-tuning, PEFT's low-rank layer, ours, the floor.

The floor is the same backward path without adapters: a frozen backbone whose first parameter and
head are trained. All take turns in one process; a ratio is taken within each round. Random weights,
random images. Each call measures one setting and replaces its rows in benchmarks/lora_step.json.

    python -m benchmarks.lora_step
    python -m benchmarks.lora_step --model vit_large_patch16_224 --dtype bf16 --batch 4 --rounds 0
    python -m benchmarks.lora_step --model vit_large_patch16_224 --dtype bf16 --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import peft
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import peft_vision as pv

KINDS = ("full", "stock", "lean", "floor")
WORDS = {
    "full": "full fine-tuning",
    "stock": "PEFT's own layer",
    "lean": "`lora`",
    "floor": "frozen, same backward path",
}
TARGET = Path(__file__).with_suffix(".json")
SEED = 0


def base(name: str) -> nn.Module:
    """A backbone with random weights: timm's by name, or transformers' ViT by size."""
    torch.manual_seed(SEED)
    if not name.startswith("transformers:"):
        return timm.create_model(name, pretrained=False, num_classes=1000)
    width, depth, heads = {"base": (768, 12, 12), "large": (1024, 24, 16)}[name.split(":")[1]]
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=1000,
    )
    return transformers.ViTForImageClassification(config)


def variant(kind: str, name: str, r: int) -> nn.Module:
    """One way to train the backbone."""
    model = base(name)
    if kind == "full":
        return model
    if kind == "floor":
        model.requires_grad_(requires_grad=False)
        first = next(model.parameters())
        head = list(model.named_children())[-1][1]
        for parameter in (first, *head.parameters()):
            parameter.requires_grad_(requires_grad=True)
        return model
    ours = pv.wrap(model, "lora", r=r, alpha=float(r))
    if kind == "lean":
        return ours
    config = ours.peft_config["default"]
    same = peft.LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
    )
    return peft.get_peft_model(base(name), same)


class Setting:
    """What is measured, and how a step of it is taken."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
        self.images = images.to(self.device)
        self.labels = torch.arange(args.batch, device=self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where it was asked for."""
        return torch.autocast(self.device.type, dtype=self.low) if self.low else nullcontext()

    def loss(self, model: nn.Module) -> Tensor:
        """Forward pass and loss."""
        with self.autocast():
            output = model(self.images)
            logits = output if isinstance(output, Tensor) else output.logits
            return F.cross_entropy(logits.float(), self.labels)

    def stepper(self, model: nn.Module) -> Callable[[], tuple[float, float]]:
        """A step with AdamW; gives its seconds, and those of all cores together."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step() -> tuple[float, float]:
            self.settle()
            start, busy = time.perf_counter(), time.process_time()
            optimizer.zero_grad()
            self.loss(model).backward()
            optimizer.step()
            self.settle()
            return time.perf_counter() - start, time.process_time() - busy

        return step

    def settle(self) -> None:
        """Wait for the accelerator."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def held(model: nn.Module, setting: Setting) -> dict[str, int]:
    """Bytes that autograd holds for backward: distinct storages, without those of the model.

    Copies of weights in another precision are counted apart; they do not grow with the batch.
    """
    tensors = [*model.parameters(), *model.buffers()]
    own = {t.untyped_storage().data_ptr() for t in tensors}
    shapes = {tuple(t.shape) for t in tensors if t.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = setting.loss(model)
    del loss
    sizes = {place: t.untyped_storage().nbytes() for place, t in kept.items()}
    low = [p for p, t in kept.items() if t.dtype in (torch.bfloat16, torch.float16)]
    copies = sum(sizes[place] for place in low if tuple(kept[place].shape) in shapes)
    return {"activations": sum(sizes.values()) - copies, "weight_copies": copies}


def timed(models: dict[str, nn.Module], setting: Setting, rounds: int) -> dict[str, Any]:
    """Steps in turns, the order reversed in every other round, started from another each time."""
    steps = {kind: setting.stepper(model) for kind, model in models.items()}
    for step in steps.values():
        step()
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in steps}
    for turn in range(rounds):
        order = [list(steps)[(i + turn) % len(steps)] for i in range(len(steps))]
        for kind in order if turn % 2 else order[::-1]:
            taken[kind].append(steps[kind]())
    return {
        kind: {
            "seconds": spread([wall for wall, _ in taken[kind]]),
            "core_seconds": spread([busy for _, busy in taken[kind]]),
            **{
                f"{measure}_of_{other}": spread(
                    [a[i] / b[i] for a, b in zip(taken[kind], taken[other], strict=True)]
                )
                for other in ("full", "stock")
                for i, measure in enumerate(("time", "core_time"))
            },
        }
        for kind in steps
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The row of one setting."""
    setting, bytes_held, peaks = Setting(args), {}, {}
    models: dict[str, nn.Module] = {}
    for kind in KINDS:
        model = variant(kind, args.model, args.r).to(setting.device).train()
        bytes_held[kind] = held(model, setting)
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            setting.stepper(model)()
            peaks[kind] = torch.cuda.max_memory_allocated()
        if args.rounds:
            models[kind] = model
    return {
        "model": args.model,
        "dtype": args.dtype,
        "batch": args.batch,
        "size": args.size,
        "r": args.r,
        "seed": SEED,
        "device": device_name(setting.device),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "load": round(os.getloadavg()[0], 1),
        "waiting": os.environ.get("OMP_WAIT_POLICY", "default"),
        "held": bytes_held,
        "peak": peaks,
        "steps": timed(models, setting, args.rounds) if args.rounds else {},
        "versions": {p: version(p) for p in ("torch", "timm", "transformers", "peft")},
    }


def device_name(device: torch.device) -> str:
    """What it ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same setting."""
    return tuple(row[name] for name in ("model", "dtype", "batch", "size", "r", "device"))


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For the card."""
    lines = []
    for row in rows:
        what = f"`{row['model']}`, {row['dtype']}, batch {row['batch']}, {row['device']}"
        stock = row["held"]["stock"]
        for kind in KINDS:
            found, step = row["held"][kind], row["steps"].get(kind)
            total = sum(found.values()) / sum(stock.values())
            lines.append(
                [
                    what,
                    WORDS[kind],
                    ratio(step["time_of_full"]) if step else "",
                    ratio(step["time_of_stock"]) if step else "",
                    f"{found['activations'] / 2**20:.0f}",
                    f"{found['weight_copies'] / 2**20:.0f}",
                    f"{total:.2f}",
                ]
            )
    note = "Median and quartiles of the ratios within a round; r = 16 on every linear of the blocks"
    columns = ["setting", "step", "time, of full", "time, of PEFT's", "activations held, MiB"]
    columns += ["weight copies held, MiB", "held, of PEFT's"]
    return {"method": "lora", "columns": columns, "rows": lines, "note": note}


def ratio(found: dict[str, float]) -> str:
    """Median and quartiles in a cell."""
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def main() -> None:
    """Measure one setting and put it into the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9, help="0: bytes only, otherwise 2 or more")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    row = measure(args)
    before = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.is_file() else {}
    rows = [old for old in before.get("rows", []) if key(old) != key(row)] + [row]
    content = {"rows": rows, "tables": [table(rows)]}
    TARGET.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
