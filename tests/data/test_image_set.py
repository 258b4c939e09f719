"""Augmentation is a function of (seed, epoch, index), and preprocessing is the checkpoint's own."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader

from peft_vision.data import preprocessing
from peft_vision.data.image_set import ImageSet, TensorSet, from_batches
from peft_vision.data.images import LabeledImages, Pictures
from peft_vision.data.settings import Augmentation, RandAugment
from peft_vision.errors import DataError

AUGMENTATION = Augmentation(crop=0.3, rand_augment=RandAugment())


class Noise(Pictures):
    def __len__(self):
        return 12

    def encoded(self, index):
        import io

        stream = io.BytesIO()
        noise = np.random.default_rng(index).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(stream, "PNG")
        return stream.getvalue()

    def name(self, index):
        return str(index)


def image_set(seed=0):
    images = LabeledImages(Noise(), tuple(range(12)), (0, 1) * 6, ("a", "b"), "noise")
    transform = preprocessing.training_transform(preprocessing.default(32), AUGMENTATION)
    return ImageSet(images, transform, seed)


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    data, again = image_set(), image_set()
    first = data[3]["pixel_values"]
    torch.rand(7)
    data[5]
    assert torch.equal(data[3]["pixel_values"], first)
    assert torch.equal(again[3]["pixel_values"], first)
    data.set_epoch(1)
    assert not torch.equal(data[3]["pixel_values"], first)
    assert not torch.equal(image_set(seed=1)[3]["pixel_values"], first)


def test_sampling_leaves_the_generator_as_it_was():
    before = torch.get_rng_state()
    image_set()[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_nothing():
    data = image_set()
    data.set_epoch(2)
    alone, helped = (
        torch.cat([batch["pixel_values"] for batch in DataLoader(data, 4, num_workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(alone, helped)


def test_preprocessing_is_the_checkpoints_own():
    model = timm.create_model("vit_small_patch14_dinov2", img_size=28, depth=1)
    found = preprocessing.of_model(model, "timm/vit_small_patch14_dinov2", 28)
    config = timm.data.resolve_data_config({}, model=model)
    assert found["size"] == 28
    assert tuple(found["mean"]) == config["mean"]
    assert found["crop_pct"] == config["crop_pct"]
    assert found["interpolation"] == "bicubic"


def test_evaluation_is_what_timm_does():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    described = preprocessing.of_model(model, "vit_tiny_patch16_224", None)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (300, 260, 3), dtype=np.uint8)
    )
    assert torch.equal(preprocessing.evaluation_transform(described)(image), theirs(image))


def test_a_transformers_processor_is_read(tmp_path):
    import json

    content = {
        "do_center_crop": True,
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.4, 0.4, 0.4],
        "resample": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = preprocessing.of_model(torch.nn.Identity(), f"transformers/{tmp_path}", None)
    assert found == {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.4, 0.4, 0.4],
        "size": 224,
        "interpolation": "bilinear",
        "crop_pct": 224 / 256,
    }


def test_incomplete_stored_preprocessing_is_refused():
    with pytest.raises(DataError, match="lacks std, size"):
        preprocessing.evaluation_transform({"mean": [0], "interpolation": "bicubic", "crop_pct": 1})


def test_batches_in_memory():
    pairs = [
        (torch.ones(2, 3, 4, 4), torch.tensor([0, 1])),
        (torch.zeros(1, 3, 4, 4), torch.ones(1)),
    ]
    data = from_batches(pairs)
    assert isinstance(data, TensorSet)
    assert len(data) == 3
    assert data[2]["pixel_values"].sum() == 0
    with pytest.raises(DataError, match="no batch"):
        from_batches([])
