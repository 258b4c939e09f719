"""Any nn.Module: linears and convolutions, and the reason why there is no more."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone
from peft_vision.errors import UnsupportedBackbone, UnsupportedSite
from tests.families import build, timm_eva, timm_vit

KINDS = ("blocks", "heads", "hidden", "tokens")


def keys(sites: Any) -> list[str]:
    return [site.key for site in sites]


def test_a_plain_network() -> None:
    backbone = view(build("generic_cnn"))
    assert backbone.family == "generic"
    assert keys(backbone.linears) == ["mlp.0", "mlp.2"]
    assert keys(backbone.convs) == ["stem.0", "depthwise"]
    assert keys(backbone.classifier) == ["fc"]
    assert backbone.input_size is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_said(kind: str) -> None:
    with pytest.raises(UnsupportedSite, match=rf"TinyCnn has no {kind}: its architecture is not"):
        view(build("generic_cnn")).require(kind)


def test_nothing_to_act_on_is_refused() -> None:
    with pytest.raises(UnsupportedBackbone, match="Flatten has neither"):
        view(nn.Flatten())


def test_a_weight_that_is_read_is_no_site() -> None:
    """nn.MultiheadAttention reads the weight of its out_proj: an adapter there never trains."""
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64
    ).eval()
    backbone = view(model)
    assert not [key for key in keys(backbone.linears) if "out_proj" in key]
    assert len(backbone.linears) == 4
    assert keys(backbone.classifier) == ["heads.head"]
    called: set[str] = set()
    for site in backbone.linears:
        site.layer.register_forward_hook(lambda *_, key=site.key: called.add(key))
    model(torch.randn(1, 3, 32, 32))
    assert called == set(keys(backbone.linears))


@pytest.mark.parametrize(
    ("name", "last", "size"),
    [
        ("resnet18", "fc", (3, 224, 224)),
        ("convnext_atto", "head.fc", (3, 224, 224)),
        ("efficientnet_b0", "classifier", (3, 224, 224)),
        ("swin_tiny_patch4_window7_224", "head.fc", (3, 224, 224)),
        ("mobilenetv3_small_050", "classifier", (3, 224, 224)),
        ("beit_base_patch16_224", "head", (3, 224, 224)),
    ],
)
def test_classifier_and_input_size_of_timm(
    name: str, last: str, size: tuple[int, int, int]
) -> None:
    with torch.device("meta"):
        backbone = view(timm.create_model(name))
    assert keys(backbone.classifier) == [last]
    assert backbone.input_size == size
    assert last not in (*keys(backbone.linears), *keys(backbone.convs))


@pytest.mark.parametrize(
    ("model", "last"),
    [
        (torchvision.models.vgg11, "classifier.6"),
        (torchvision.models.mobilenet_v3_small, "classifier.3"),
        (torchvision.models.resnet18, "fc"),
    ],
)
def test_classifier_of_torchvision(model: Any, last: str) -> None:
    with torch.device("meta"):
        assert keys(view(model()).classifier) == [last]


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_linears_whose_weight_is_read_are_called_when_asked(name: str) -> None:
    small = {"img_size": 32, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 2}
    if name.startswith("swin"):
        small = {**small, "depth": None, "depths": (2,), "num_heads": (2,), "window_size": 4}
        del small["depth"]
    model = timm.create_model(name, **small).eval().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    backbone = view(model)
    assert backbone.bypasses
    backbone.call_every_linear()
    called: set[str] = set()
    for site in backbone.linears:
        site.layer.register_forward_hook(lambda *_, key=site.key: called.add(key))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert called == set(keys(backbone.linears))


class Twice(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.again(self.first(x))
        return result


def test_a_shared_layer_is_one_site() -> None:
    assert keys(view(Twice()).linears) == ["first"]


def test_a_linear_alone_in_a_container() -> None:
    assert keys(view(nn.Sequential(OrderedDict(a=nn.Linear(2, 2)))).linears) == ["a"]


def variant(name: str) -> nn.Module:
    """Members of families that are not understood in full."""
    from timm.layers import DiffAttention
    from timm.models import vision_transformer as vit

    def built() -> nn.Module:
        if name == "parallel":
            return timm_vit(block_fn=vit.ParallelScalingBlock)
        if name == "things":
            return timm_vit(block_fn=vit.ParallelThingsBlock)
        return timm_vit(attn_layer=DiffAttention)

    with torch.device("meta"):
        return built()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("parallel", "its blocks are of class ParallelScalingBlock"),
        ("things", "its blocks are of class ParallelThingsBlock"),
        ("differential", "its attention is of class DiffAttention"),
    ],
)
def test_a_part_that_is_not_understood_is_named(name: str, why: str) -> None:
    backbone = view(variant(name))
    assert backbone.family == "generic"
    assert backbone.linears
    for kind in KINDS:
        with pytest.raises(UnsupportedSite, match=why):
            backbone.require(kind)


def rope_with(**changes: Any) -> Backbone:
    with torch.device("cpu"):
        return view(timm_eva(attn_type="rope", use_rot_pos_emb=True, **changes))


def test_mixed_rope_keeps_what_does_not_depend_on_depth_or_head() -> None:
    backbone = rope_with(rope_type="mixed")
    assert backbone.family == "timm_eva"
    assert len(backbone.hidden) == 4
    backbone.require("linears", "hidden")
    for kind in ("blocks", "heads", "tokens"):
        with pytest.raises(UnsupportedSite, match="rotary frequencies of its own"):
            backbone.require(kind)


def test_grouped_queries_keep_what_does_not_depend_on_heads() -> None:
    backbone = rope_with(num_kv_heads=2, qkv_fused=False)
    backbone.require("linears", "hidden", "blocks")
    for kind in ("heads", "tokens"):
        with pytest.raises(UnsupportedSite, match="grouped-query"):
            backbone.require(kind)


def test_feature_maps_need_every_patch() -> None:
    from transformers import Dinov2Backbone, Dinov2Config

    config = Dinov2Config(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    backbone = view(Dinov2Backbone(config))
    assert len(backbone.heads) == 2
    with pytest.raises(UnsupportedSite, match="feature maps need every patch"):
        backbone.require("tokens")


def test_names_of_another_version_are_said_not_guessed() -> None:
    model = build("hf_vit")
    for layer in model.vit.layers:
        layer.attention.out = layer.attention.o_proj
        del layer.attention.o_proj
    backbone = view(model)
    assert backbone.family == "generic"
    with pytest.raises(UnsupportedSite, match="ViTAttention has no o_proj"):
        backbone.require("heads")
