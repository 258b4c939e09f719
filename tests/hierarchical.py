"""Tiny random backbones of several stages, on 64 px images: one per attention that is cut.

Made from the classes of timm, so that they are small; weights as in `families.scramble`, and the
statistics of batches are random, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SIDE, CLASSES = 64, 5


def of(module: str, cls: str, *configured: Any, **settings: Any) -> nn.Module:
    """A model of timm from its class."""
    made: nn.Module = getattr(importlib.import_module(f"timm.models.{module}"), cls)(
        *configured, num_classes=CLASSES, **settings
    )
    return made


def configured(module: str, cls: str, config: str, **settings: Any) -> nn.Module:
    """A model of timm whose class takes a configuration of another one."""
    cfg = getattr(importlib.import_module(f"timm.models.{module}"), config)(**settings)
    size = (SIDE, SIDE) if module == "mvitv2" else SIDE
    return of(module, cls, cfg, img_size=size)


def maxxvit(block: str, **settings: Any) -> nn.Module:
    """MaxViT ("M") or CoAtNet ("T"), whose attention is laid out in four ways."""
    from timm.models.maxxvit import MaxxVitTransformerCfg

    attention = MaxxVitTransformerCfg(dim_head=8, window_size=(2, 2), **settings)
    return configured(
        "maxxvit",
        "MaxxVit",
        "MaxxVitCfg",
        embed_dim=(16, 32),
        depths=(1, 1),
        block_type=("C" if block == "T" else "M", block),
        stem_width=8,
        transformer_cfg=attention,
    )


def volo() -> nn.Module:
    """VOLO, which says in its configuration that it has two classifiers."""
    model: Any = of(
        "volo",
        "VOLO",
        layers=(1, 1, 1, 0),
        img_size=SIDE,
        embed_dims=(16, 32, 32, 32),
        num_heads=(2, 4, 4, 4),
        stem_hidden_dim=8,
    )
    model.pretrained_cfg = {"classifier": ("head", "aux_head")}
    return model  # type: ignore[no-any-return]


SWIN: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
}
PYRAMID: dict[str, Any] = {
    "embed_dims": (16, 16, 24, 32),
    "num_heads": (2, 2, 3, 4),
    "depths": (1, 1, 1, 1),
}
PLAIN: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
}

HIERARCHICAL: dict[str, Callable[[], nn.Module]] = {
    "swin": partial(of, "swin_transformer", "SwinTransformer", **SWIN),
    "swin_v2": partial(of, "swin_transformer_v2", "SwinTransformerV2", **SWIN),
    "swin_v2_cr": partial(of, "swin_transformer_v2_cr", "SwinTransformerV2Cr", **SWIN),
    "pvt_v2": partial(of, "pvt_v2", "PyramidVisionTransformerV2", **PYRAMID),
    "pvt_v2_linear": partial(of, "pvt_v2", "PyramidVisionTransformerV2", linear=True, **PYRAMID),
    "twins": partial(
        of,
        "twins",
        "Twins",
        img_size=SIDE,
        embed_dims=(16, 16, 24, 32),
        num_heads=(2, 2, 3, 4),
        depths=(2, 2, 1, 1),
        wss=(7, 3, 3, 2),
    ),
    "hiera": partial(
        of, "hiera", "Hiera", img_size=(SIDE, SIDE), embed_dim=16, num_heads=2, stages=(1, 1, 2, 1)
    ),
    "hiera_sam2": partial(
        of, "hieradet_sam2", "HieraDet", embed_dim=16, num_heads=2, stages=(1, 1, 2, 1)
    ),
    "mvit_v2": partial(
        configured,
        "mvitv2",
        "MultiScaleVit",
        "MultiScaleVitCfg",
        depths=(1, 1, 2, 1),
        embed_dim=16,
        num_heads=2,
    ),
    "maxvit_tf": partial(maxxvit, "M", rel_pos_type="bias_tf", head_first=False),
    "maxvit_rmlp": partial(maxxvit, "M", rel_pos_type="mlp"),
    "coatnet": partial(maxxvit, "T", use_nchw_attn=True),
    "crossvit": partial(
        of,
        "crossvit",
        "CrossVit",
        img_size=SIDE,
        img_scale=(1.0, 1.0),
        patch_size=(8, 16),
        embed_dim=(16, 32),
        depth=((1, 2, 0), (1, 1, 0)),
        num_heads=(2, 4),
        mlp_ratio=(3, 3, 1),
    ),
    "convit": partial(of, "convit", "ConVit", local_up_to_layer=1, **PLAIN),
    "cait": partial(of, "cait", "Cait", depth_token_only=2, **PLAIN),
    "xcit": partial(of, "xcit", "Xcit", **PLAIN),
    "davit": partial(of, "davit", "DaVit", window_size=4, **PYRAMID),
    "beit": partial(of, "beit", "Beit", use_rel_pos_bias=True, init_values=0.1, **PLAIN),
    "volo": volo,
    "levit": partial(
        of,
        "levit",
        "Levit",
        img_size=SIDE,
        embed_dim=(16, 32, 48),
        key_dim=8,
        num_heads=(2, 4, 3),
        depth=(1, 1, 1),
        down_op="subsample",
    ),
    "levit_conv": partial(
        of,
        "levit",
        "Levit",
        img_size=SIDE,
        embed_dim=(16, 32, 48),
        key_dim=8,
        num_heads=(2, 4, 3),
        depth=(1, 1, 1),
        use_conv=True,
    ),
    "focalnet": partial(
        of,
        "focalnet",
        "FocalNet",
        embed_dim=16,
        depths=(1, 1, 1),
        focal_levels=(2, 2, 2),
        focal_windows=(3, 3, 3),
    ),
    "gcvit": partial(
        of,
        "gcvit",
        "GlobalContextVit",
        img_size=SIDE,
        window_ratio=None,
        window_size=((4, 4), (4, 4), (4, 4), (2, 2)),
        embed_dim=16,
        depths=(1, 2, 2, 2),
        num_heads=(2, 2, 4, 4),
    ),
    "pit": partial(
        of,
        "pit",
        "PoolingVisionTransformer",
        img_size=SIDE,
        patch_size=16,
        stride=8,
        base_dims=(16, 16, 16),
        depth=(1, 1, 1),
        heads=(2, 4, 8),
        mlp_ratio=4,
        stem_type="overlap",
    ),
    "tnt": partial(
        of,
        "tnt",
        "TNT",
        img_size=SIDE,
        patch_size=16,
        embed_dim=32,
        inner_dim=16,
        depth=2,
        num_heads_inner=4,
        num_heads_outer=4,
    ),
    "nest": partial(
        of,
        "nest",
        "Nest",
        img_size=SIDE,
        patch_size=4,
        embed_dims=(16, 32, 48),
        num_heads=(2, 4, 3),
        depths=(1, 1, 1),
        num_levels=3,
    ),
    "coat": partial(
        of,
        "coat",
        "CoaT",
        img_size=SIDE,
        patch_size=4,
        embed_dims=(16, 16, 16, 16),
        serial_depths=(1, 1, 1, 1),
        parallel_depth=1,
        num_heads=2,
        crpe_window={3: 1, 5: 1},
    ),
    "efficientvit": partial(
        of,
        "efficientvit_msra",
        "EfficientVitMsra",
        img_size=SIDE,
        embed_dim=(16, 32, 48),
        key_dim=(4, 4, 4),
        depth=(1, 1, 1),
        num_heads=(2, 2, 3),
        window_size=(7, 7, 7),
        kernels=(3, 3, 3),
    ),
    "tiny_vit": partial(
        of,
        "tiny_vit",
        "TinyVit",
        embed_dims=(16, 16, 32, 32),
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 4, 4),
        window_sizes=(4, 4, 4, 2),
    ),
    "efficientformer_v2": partial(
        of,
        "efficientformer_v2",
        "EfficientFormerV2",
        img_size=SIDE,
        embed_dims=(16, 16, 16, 32),
        depths=(1, 1, 2, 2),
        num_vit=1,
        distillation=False,
    ),
    "edgenext": partial(
        of,
        "edgenext",
        "EdgeNeXt",
        dims=(16, 32, 32, 48),
        depths=(1, 2, 2, 2),
        heads=(4, 4, 4, 4),
    ),
    "sam": partial(
        of,
        "vision_transformer_sam",
        "VisionTransformerSAM",
        global_attn_indexes=(1,),
        window_size=4,
        use_rel_pos=True,
        **{**PLAIN, "patch_size": 8},
    ),
    "relpos": partial(
        of,
        "vision_transformer_relpos",
        "VisionTransformerRelPos",
        rel_pos_type="mlp",
        rel_pos_dim=16,
        **PLAIN,
    ),
    "visformer": partial(
        of,
        "visformer",
        "Visformer",
        img_size=SIDE,
        embed_dim=64,
        depth=(1, 1, 1),
        num_heads=4,
        init_channels=8,
    ),
}
"""Name -> a factory of a model with timm's own first values."""

SMALL: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
STAGES: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 24, 32],
    "num_attention_heads": [2, 2, 3, 4],
}
SWIN_HF = {name: value for name, value in SWIN.items() if name != "img_size"} | {"image_size": SIDE}


def hf(config: str, model: str, **settings: Any) -> nn.Module:
    """A model of transformers from its configuration."""
    import transformers

    made: nn.Module = getattr(transformers, model)(
        getattr(transformers, config)(num_labels=CLASSES, **settings)
    )
    return made


HIERARCHICAL |= {
    "hf_swin": partial(hf, "SwinConfig", "SwinForImageClassification", **SWIN_HF),
    "hf_swin_v2": partial(hf, "Swinv2Config", "Swinv2ForImageClassification", **SWIN_HF),
    "hf_pvt_v2": partial(
        hf, "PvtV2Config", "PvtV2ForImageClassification", image_size=SIDE, **STAGES
    ),
    "hf_segformer": partial(hf, "SegformerConfig", "SegformerForImageClassification", **STAGES),
    "hf_hiera": partial(
        hf,
        "HieraConfig",
        "HieraForImageClassification",
        image_size=[SIDE, SIDE],
        embed_dim=16,
        num_heads=[2, 4, 8, 16],
        depths=[1, 1, 2, 1],
    ),
    "hf_levit": partial(
        hf,
        "LevitConfig",
        "LevitForImageClassification",
        image_size=SIDE,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[2, 4, 3],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "hf_beit": partial(
        hf, "BeitConfig", "BeitForImageClassification", use_relative_position_bias=True, **SMALL
    ),
    "hf_data2vec": partial(
        hf,
        "Data2VecVisionConfig",
        "Data2VecVisionForImageClassification",
        use_relative_position_bias=True,
        **SMALL,
    ),
    "hf_deit": partial(hf, "DeiTConfig", "DeiTForImageClassification", **SMALL),
    "hf_dpt": partial(hf, "DPTConfig", "DPTModel", backbone_out_indices=[0, 1], **SMALL),
}

HEADLESS = ("focalnet", "coat", "efficientvit", "efficientformer_v2")
"""Those whose heads cannot go one by one, or that have none."""


def hierarchical(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One of them, the same each time, with values that hide nothing."""
    from tests.families import scramble

    torch.manual_seed(0)
    model = scramble(HIERARCHICAL[name]())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.to(dtype)


def large_images(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    """Random images that all of them take: B 3 64 64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)
