"""Which scores of attention heads to trust, on a fine-tuned model; writes a JSON file.

Scores are taken on some images. Then, on as many others: Kendall's tau of each with leaving each
head out there, and what is lost when the heads that each ranks lowest are all replaced by their
means at once.

    python -m benchmarks.importance SAVED_FOLDER FOLDER_OF_IMAGES
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone
from peft_vision.cost import unwrap
from peft_vision.data import preprocessing
from peft_vision.data.image_set import batches_of
from peft_vision.data.source import open_for_calibration
from peft_vision.importance import Importance, find, kendall, names
from peft_vision.importance._probing import changing, means_of, reader

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "leave_one_out": ("leave_one_out", {}),
    "leave_one_out, drop": ("leave_one_out", {"harm": "drop"}),
    "taylor": ("taylor", {}),
    "taylor, toward zero": ("taylor", {"toward": "zero"}),
    "taylor, toward zero, normalized": ("taylor", {"toward": "zero", "normalize": True}),
    "contextual_decomposition": ("contextual_decomposition", {}),
    "contextual_decomposition, not normalized": ("contextual_decomposition", {"normalize": False}),
    "signal_to_noise": ("signal_to_noise", {}),
    "signal_to_noise, mean": ("signal_to_noise", {"measure": "mean"}),
    "attention_entropy": ("attention_entropy", {}),
    "attention_entropy, confidence": ("attention_entropy", {"measure": "confidence"}),
    "discrete_codes": ("discrete_codes", {}),
    "weight_norm": ("weight_norm", {}),
}
REMOVED = (0.25, 0.5)
DRAWS = 8


def ablated(x: Tensor, mean: Tensor, heads: list[int], width: int) -> Tensor:
    """B N F with some heads at their mean."""
    changed = x.clone()
    for head in heads:
        changed[..., head * width : (head + 1) * width] = mean[head * width : (head + 1) * width]
    return changed


@torch.no_grad()
def loss_without(
    backbone: Backbone, heads: list[tuple[int, int]], images: list[Tensor], means: dict[int, Tensor]
) -> float:
    """Mean KL divergence, in nats, of the answers with these heads at their means."""
    model: nn.Module = backbone.model.eval()
    whole = [model(x).double().log_softmax(-1) for x in images]
    with ExitStack() as stack:
        for site in backbone.heads:
            mine = [head for block, head in heads if block == site.block]
            mean = means[site.block].float()
            change = partial(ablated, mean=mean, heads=mine, width=len(mean) // site.count)
            stack.enter_context(changing(reader(site), change))
        now = [model(x).double().log_softmax(-1) for x in images]
    return float(
        torch.cat([(p.exp() * (p - q)).sum(1) for p, q in zip(whole, now, strict=True)]).mean()
    )


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The score, and how long a core worked on it."""
    start = time.process_time()
    return run(), time.process_time() - start


def row(
    score: Tensor, truth: Tensor, damage: Callable[[list[tuple[int, int]]], float]
) -> dict[str, Any]:
    """Agreement with the truth, and the damage at each share of heads removed."""
    found = Importance({"score": score}, 0)
    count = int((~score.isnan()).sum())
    return {
        "kendall": kendall(score, truth),
        "kl": {str(share): damage(found.lowest(round(share * count))) for share in REMOVED},
    }


def at_random(
    shape: torch.Size, damage: Callable[[list[tuple[int, int]]], float]
) -> dict[str, Any]:
    """What scores that are drawn do, on average over the draws."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(DRAWS)]
    lost = [row(score, score, damage)["kl"] for score in drawn]
    kl = {share: sum(one[share] for one in lost) / DRAWS for share in lost[0]}
    return {"kendall": None, "kl": kl}


def main() -> None:
    """Write the figures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=64)
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = pv.load(asked.model)
    backbone, count = view(unwrap(model)), 2 * asked.images
    described = model.history.preprocessing or preprocessing.of_model(unwrap(model), "", None)
    transform = preprocessing.evaluation_transform(described)
    loaded = batches_of(open_for_calibration(asked.data, count), transform, count)
    together = torch.cat([images for images, _ in loaded])
    seen, others = (
        list(half.split(32)) for half in (together[: asked.images], together[asked.images :])
    )
    means = means_of(backbone, seen)
    damage = partial(loss_without, backbone, images=others, means=means)
    truth = find("leave_one_out")(backbone, others)
    scores, rows = {}, {}
    for name, (score, settings) in VARIANTS.items():
        scores[name], seconds = timed(partial(find(score), backbone, seen, **settings))
        rows[name] = {**row(scores[name], truth, damage), "seconds": round(seconds, 2)}
        print(name, rows[name], flush=True)
    votes = Importance({name: scores[name] for name in names()}, 0).rank
    rows["mean rank of all, as they are by default"] = row(votes, truth, damage)
    rows[f"random, mean of {DRAWS}"] = at_random(votes.shape, damage)
    content = {
        "model": f"{type(backbone.model).__name__}, {len(backbone.heads)} blocks, "
        f"{sum(site.count for site in backbone.heads)} heads",
        "images": asked.images,
        "held_out": len(together) - asked.images,
        "rows": rows,
        "machine": f"one CPU core, {torch.backends.cpu.get_cpu_capability()}",
        "seed": 0,
        "versions": {p: version(p) for p in ("torch", "timm", "peft")},
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(target.name)


if __name__ == "__main__":
    main()
