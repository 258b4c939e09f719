"""Compress, save, load again on the bit, adapt, merge, and export to ONNX.

    python examples/03_save_load_export.py path/to/images out/

The images are not looked at; the argument is there so that all examples are called alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import peft_vision as pv
from peft_vision.cost import example_input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="timm/deit_small_patch16_224")
    parser.add_argument("--random-weights", action="store_true", help="download nothing")
    options = parser.parse_args()
    torch.manual_seed(0)

    model = pv.create_model(options.model, pretrained=not options.random_weights)
    result = pv.compress(model, target_flops=0.7, methods=["magnitude"])
    result.save_pretrained(options.out / "small")

    # Loading applies the saved plan to a base without weights, then fills in the tensors.
    small, again = result.model.eval(), pv.load(options.out / "small").eval()
    images = example_input(model, batch=2)
    with torch.no_grad():
        print("bit-exact:", torch.equal(small(images), again(images)))
    plan = json.loads((options.out / "small" / "peft_vision.json").read_text())["plan"]
    print("steps of the plan:", [step["method"] for step in plan["steps"]])

    # A compressed model can be adapted like any other; merging folds the adapter into it.
    adapted = pv.wrap(again, method="lora", r=4)
    adapted.print_trainable_parameters()
    plain = pv.merge(adapted.eval()).eval()
    print(pv.measure(plain))


if __name__ == "__main__":
    main()
