"""What every test stands on: one seed, one thread, no network, tiny random backbones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


@pytest.fixture(autouse=True)
def one_seed_one_thread() -> None:
    """The same numbers on every machine, and no fight for cores between test processes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def tiny_timm() -> Callable[..., nn.Module]:
    """A factory of timm ViTs of 4 blocks, 48 wide, 3 heads, on 32 px images (16 patches)."""
    timm = pytest.importorskip("timm")

    def build(name: str = "vit_tiny_patch16_224", **changes: object) -> nn.Module:
        settings: dict[str, object] = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 4,
            "num_heads": 3,
            "num_classes": 5,
        }
        return timm.create_model(name, pretrained=False, **{**settings, **changes}).eval()

    return build


@pytest.fixture
def tiny_transformers() -> Callable[..., nn.Module]:
    """A factory of transformers ViT classifiers of 4 blocks, 48 wide, 3 heads, on 32 px images."""
    transformers = pytest.importorskip("transformers")

    def build(**changes: object) -> nn.Module:
        settings: dict[str, object] = {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_labels": 5,
        }
        config = transformers.ViTConfig(**{**settings, **changes})
        return transformers.ViTForImageClassification(config).eval()

    return build


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """A factory of folders `<split>/<class>/<n>.png`: each class is one color plus noise."""

    def build(
        classes: tuple[str, ...] = ("blue", "green", "red"),
        images: int = 6,
        splits: tuple[str, ...] = ("train", "val"),
        size: int = 32,
    ) -> Path:
        root, noise = tmp_path / "images", np.random.default_rng(0)
        for split in splits:
            for number, name in enumerate(classes):
                folder = root / split / name
                folder.mkdir(parents=True)
                for index in range(images):
                    pixels = noise.integers(0, 60, (size, size, 3), dtype=np.uint8)
                    pixels[..., number % 3] += 150
                    Image.fromarray(pixels).save(folder / f"{index}.png")
        return root

    return build
