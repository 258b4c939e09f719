"""Fine-tune a ViT with LoRA on a folder of images, and use what was saved.

    python examples/01_lora_finetune.py path/to/images out/

The folder holds `train/<class>/*.jpg` and, if there is one, `val/<class>/*.jpg`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import peft_vision as pv
from peft_vision.cost import example_input
from peft_vision.data.settings import DataSettings
from peft_vision.finetuning import finetune
from peft_vision.recipe import MethodSettings, ModelSettings, Recipe
from peft_vision.training.settings import TrainSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="timm/vit_small_patch16_224")
    parser.add_argument("--random-weights", action="store_true", help="download nothing")
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()

    # The same settings in a YAML file are a recipe: peft-vision finetune RECIPE.yaml
    done = finetune(
        Recipe(
            model=ModelSettings(name=options.model, pretrained=not options.random_weights),
            methods=[MethodSettings(name="lora", r=16)],
            data=DataSettings(train=str(options.images)),
            train=TrainSettings(epochs=options.epochs, batch_size=8, learning_rate=1e-3),
            output=str(options.out),
        )
    )
    done.model.print_trainable_parameters()
    print({name: round(value, 4) for name, value in done.metrics.items()})

    # The saved folder is an adapter; the base model is built again from its recorded source.
    adapted = pv.load(done.output) if not options.random_weights else done.model
    plain = pv.merge(adapted).eval()
    with torch.no_grad():
        scores = plain(example_input(plain)).softmax(dim=-1)
    print(dict(zip(adapted.history.labels, scores[0].tolist(), strict=True)))


if __name__ == "__main__":
    main()
