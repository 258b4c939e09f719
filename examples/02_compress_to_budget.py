"""Compress a classifier to a share of its FLOPs, two ways, and compare time as well as FLOPs.

    python examples/02_compress_to_budget.py path/to/images small/

The images (a folder per class under `train`) are for methods that look at data; the two used here
decide without.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import peft_vision as pv
from peft_vision.cost import example_input, time_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="timm/deit_small_patch16_224")
    parser.add_argument("--random-weights", action="store_true", help="download nothing")
    parser.add_argument("--budget", type=float, default=0.6, help="share of the FLOPs")
    options = parser.parse_args()
    torch.manual_seed(0)

    model = pv.create_model(options.model, pretrained=not options.random_weights).eval()
    models = {"whole": model}
    for methods in (["magnitude"], ["magnitude", "token_reorganization"]):
        result = pv.compress(model, target_flops=options.budget, methods=methods)
        print(result)
        result.save_pretrained(options.out / "+".join(methods))
        models["+".join(methods)] = result.model.eval()

    timings = time_on(models, example_input(model, batch=2), rounds=5)
    whole = timings["whole"].median
    for name, timing in timings.items():
        share = pv.measure(models[name]).flops / pv.measure(model).flops
        print(f"{name:32} FLOPs {share:.3f}  time {timing.median / whole:.3f}")


if __name__ == "__main__":
    main()
