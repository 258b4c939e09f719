"""Tiny random backbones, one per variant that a family file has to get right.

32 px images, 8 px patches (16 patches), 32 wide, 4 blocks of 4 heads of 8: a forward pass takes
milliseconds. Every factory draws its weights from torch's global generator and returns a model in
evaluation mode whose biases, norms and scales are random too, so that nothing is hidden by a zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 8, 32, 4, 4, 5
PATCHES = (SIZE // PATCH) ** 2


def scramble(model: nn.Module) -> nn.Module:
    """Random values where initializations put zeros and ones, in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_meta:
                continue
            if parameter.dim() < 2 or not parameter.any():
                parameter.normal_(0.0, 0.3).add_(0.5 if parameter.dim() < 2 else 0.0)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model.eval()


def timm_vit(**changes: Any) -> nn.Module:
    """A VisionTransformer of timm."""
    from timm.models.vision_transformer import VisionTransformer

    settings = {
        "img_size": SIZE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
    }
    return scramble(VisionTransformer(**{**settings, **changes}))


def timm_deit_distilled() -> nn.Module:
    """DeiT with a distillation token."""
    from timm.models.deit import VisionTransformerDistilled

    return scramble(
        VisionTransformerDistilled(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            num_classes=CLASSES,
        )
    )


def timm_quickgelu_clip() -> nn.Module:
    """CLIP's tower in timm: norm before the blocks, quick GELU."""
    from timm.layers import get_act_layer

    return timm_vit(pre_norm=True, act_layer=get_act_layer("quick_gelu"))


def timm_gated(kind: str) -> nn.Module:
    """A ViT with a gated MLP; `kind` is a class of timm.layers."""
    from timm import layers

    if kind == "GluMlp":
        return timm_vit(mlp_layer=layers.GluMlp)
    return timm_vit(mlp_layer=layers.SwiGLU, scale_mlp_norm=True)


def timm_normed() -> nn.Module:
    """A ViT with every optional part: norms on q, k, heads and units, and gates on both
    branches."""
    from timm.layers import RmsNorm, SwiGLU

    model = timm_vit(
        qk_norm=True,
        scale_attn_norm=True,
        scale_mlp_norm=True,
        norm_layer=RmsNorm,
        mlp_layer=SwiGLU,
    )
    for block in model.blocks:
        block.attn.gate = nn.Linear(WIDTH, WIDTH)
    return scramble(model)


def timm_eva(**changes: Any) -> nn.Module:
    """An Eva of timm."""
    from timm.models.eva import Eva

    settings = {
        "img_size": SIZE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
    }
    return scramble(Eva(**{**settings, **changes}))


def eva02_small(**changes: Any) -> nn.Module:
    """EVA-02 tiny and small: fused q, k, v with biases beside it, packed SwiGLU."""
    rope = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    return timm_eva(mlp_ratio=8 / 3, swiglu_mlp=True, **rope, **changes)


def eva02_base(**changes: Any) -> nn.Module:
    """EVA-02 base and large: separate q, k, v, SwiGLU with a norm inside."""
    return eva02_small(qkv_fused=False, scale_mlp=True, **changes)


def eva_dinov3(**changes: Any) -> nn.Module:
    """DINOv3 in timm: registers, LayerScale, rotation by halves, no absolute positions."""
    return timm_eva(
        global_pool=changes.pop("global_pool", "token"),
        qkv_bias=changes.pop("qkv_bias", False),
        init_values=0.5,
        rope_type="dinov3",
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_rotate_half=True,
        num_reg_tokens=4,
        use_fc_norm=False,
        **changes,
    )


def _configured(config: str, model: str, wrap: str | None = None, **changes: Any) -> nn.Module:
    import transformers

    settings = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
    }
    if config not in ("Dinov2Config", "Dinov2WithRegistersConfig"):
        settings["intermediate_size"] = 4 * WIDTH
    if wrap is None:
        settings["num_labels"] = CLASSES
    attention = changes.pop("attn_implementation", "sdpa")
    configuration = getattr(transformers, config)(**{**settings, **changes})
    if wrap is not None:
        vision = configuration.to_dict()
        configuration = getattr(transformers, wrap)(vision_config=vision, num_labels=CLASSES)
    cls = getattr(transformers, model)
    return scramble(cls._from_config(configuration, attn_implementation=attention))


hf_vit = partial(_configured, "ViTConfig", "ViTForImageClassification")
hf_dinov2 = partial(_configured, "Dinov2Config", "Dinov2Model", layerscale_value=0.5)
hf_dinov2_classifier = partial(_configured, "Dinov2Config", "Dinov2ForImageClassification")
hf_dinov2_registers = partial(
    _configured, "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", num_register_tokens=4
)
hf_dinov3 = partial(_configured, "DINOv3ViTConfig", "DINOv3ViTModel", num_register_tokens=4)
hf_clip = partial(_configured, "CLIPVisionConfig", "CLIPVisionModel")
hf_clip_classifier = partial(
    _configured, "CLIPVisionConfig", "CLIPForImageClassification", "CLIPConfig"
)
hf_siglip = partial(_configured, "SiglipVisionConfig", "SiglipVisionModel")
hf_siglip_classifier = partial(
    _configured, "SiglipVisionConfig", "SiglipForImageClassification", "SiglipConfig"
)


def timm_post_norm() -> nn.Module:
    """A ViT that normalizes after its branches (Swin v2's way)."""
    from timm.models.vision_transformer import ResPostBlock

    return timm_vit(block_fn=ResPostBlock)


class TinyCnn(nn.Module):
    """A plain convolutional network with an MLP behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.depthwise(self.stem(x)).mean((2, 3))
        logits: Tensor = self.fc(self.mlp(features))
        return logits


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm_vit": timm_vit,
    "timm_vit_average": partial(timm_vit, global_pool="avg"),
    "timm_vit_normed": timm_normed,
    "timm_vit_glu": partial(timm_gated, "GluMlp"),
    "timm_vit_swiglu": partial(timm_gated, "SwiGLU"),
    "timm_deit_distilled": timm_deit_distilled,
    "timm_deit3": partial(timm_vit, init_values=0.5, no_embed_class=True),
    "timm_dinov2": partial(timm_vit, init_values=0.5),
    "timm_dinov2_registers": partial(timm_vit, init_values=0.5, reg_tokens=4, no_embed_class=True),
    "timm_clip": timm_quickgelu_clip,
    "timm_siglip": partial(timm_vit, class_token=False, global_pool="map"),
    "timm_eva02_small": eva02_small,
    "timm_eva02_small_class": partial(eva02_small, global_pool="token"),
    "timm_eva02_base": eva02_base,
    "timm_eva_inner_norm": partial(eva02_base, scale_attn_inner=True, global_pool="token"),
    "timm_eva_dinov3": eva_dinov3,
    "timm_eva_dinov3_qkv_bias": partial(eva_dinov3, qkv_bias=True, swiglu_mlp=True),
    "timm_eva_rope": partial(
        timm_eva, attn_type="rope", use_rot_pos_emb=True, global_pool="map", class_token=True
    ),
    "hf_vit": hf_vit,
    "hf_dinov2": hf_dinov2,
    "hf_dinov2_swiglu": partial(hf_dinov2, use_swiglu_ffn=True),
    "hf_dinov2_registers": hf_dinov2_registers,
    "hf_dinov2_classifier": hf_dinov2_classifier,
    "hf_dinov3": hf_dinov3,
    "hf_dinov3_gated": partial(hf_dinov3, use_gated_mlp=True),
    "hf_clip": hf_clip,
    "hf_clip_classifier": hf_clip_classifier,
    "hf_siglip": hf_siglip,
    "hf_siglip_classifier": hf_siglip_classifier,
    "generic_cnn": lambda: scramble(TinyCnn()),
}
"""Name -> a factory; the same weights whenever it is called after the same torch.manual_seed."""

NO_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "timm_vit_post_norm": timm_post_norm,
    "timm_eva_post_norm": partial(timm_eva, use_post_norm=True, use_fc_norm=False),
}
"""Families that are understood but for their token stream."""

TRANSFORMERS = tuple(name for name in FAMILIES if not name.startswith("generic"))
"""The families that are understood in full."""

CLASS_POOLED = (
    "timm_vit",
    "timm_vit_normed",
    "timm_vit_glu",
    "timm_vit_swiglu",
    "timm_deit_distilled",
    "timm_deit3",
    "timm_dinov2",
    "timm_dinov2_registers",
    "timm_clip",
    "timm_eva02_small_class",
    "timm_eva_inner_norm",
    "timm_eva_dinov3",
    "timm_eva_dinov3_qkv_bias",
    "hf_vit",
    "hf_dinov2",
    "hf_dinov2_swiglu",
    "hf_dinov2_registers",
    "hf_dinov3",
    "hf_dinov3_gated",
    "hf_clip",
)
"""Those whose head reads the class token alone: the ones whose patches may leave on the way."""

ROTARY = tuple(
    name for name in FAMILIES if "dinov3" in name or name.startswith("timm_eva") or "rope" in name
)


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One family's backbone, the same for the same seed."""
    torch.manual_seed(seed)
    return {**FAMILIES, **NO_TOKENS}[name]().to(dtype)


def images(
    model: nn.Module | None = None, batch: int = 2, dtype: torch.dtype | None = None
) -> Tensor:
    """Random images that every family takes, in the model's dtype unless told: B 3 32 32."""
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters()), None) if model else torch.float32
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)


def features(output: Any) -> Tensor:
    """What a downstream head would read: logits, or the pooled features, or the sequence."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "pooler_output", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            return value  # type: ignore[no-any-return]
    raise TypeError(type(output).__name__)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    """What a model in evaluation mode gives for images."""
    return features(model.eval()(x))


def moved(model: Any, seed: int = 1) -> Any:
    """The trained tensors somewhere else, the same for the same seed; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.05 * noise)
    return model.eval()
