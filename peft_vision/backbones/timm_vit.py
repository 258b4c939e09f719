"""timm's VisionTransformer: ViT, DeiT (distilled, III), DINOv2 (registers), CLIP, SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from peft_vision.backbones import _timm_positions, _timm_width
from peft_vision.backbones.assembly import (
    assemble,
    is_conv,
    is_linear,
    lacking,
    last_layers,
    layers_in,
    readouts_in,
    whole_mlp,
)
from peft_vision.backbones.sites import Backbone, LayerSite, Pooling, ReadoutSite, TokensSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention import attention_inside
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.block import BlockParts
from peft_vision.layers.bottleneck import inside
from peft_vision.layers.masked_norm import by_root_mean_square, masked_norm
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.surgery import keep_features, select_parameter
from peft_vision.layers.trunk import blocks_in

MODULES = ("timm.models.vision_transformer", "timm.models.deit")

POOLING: dict[str, Pooling] = {"token": "class", "avg": "average", "map": "attention", "": "none"}

ATTENTION = AttentionParts(
    qkv=("qkv",),
    out="proj",
    q_norm="q_norm",
    k_norm="k_norm",
    norm="norm",
    gate="gate",
    heads=("num_heads",),
    width=("attn_dim",),
    dropout="attn_drop",
    out_dropout="proj_drop",
)

PLAIN = MlpParts(up=("fc1",), down="fc2", norm="norm")


def why_not(model: Any) -> str:
    """What keeps the model from being understood in full; empty when nothing does."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

    if not isinstance(model, VisionTransformer):
        return f"{type(model).__name__} is not timm's VisionTransformer"
    blocks: list[Any] = [block for _, _, block in blocks_in(model.blocks)]
    for block in blocks:
        if type(block) not in (Block, ResPostBlock):
            return f"its blocks are of class {type(block).__name__}"
        attention = attention_inside(block.attn)
        if type(attention) not in (Attention, Absent):
            return f"its attention is of class {type(attention).__name__}"
        if mlp_parts(block.mlp) is None and whole_mlp([block], "mlp") is not None:
            return f"its MLPs are of class {type(block.mlp).__name__}"
    return lacking(model.blocks, _parts(blocks)) if blocks else "it has no blocks"


def mlp_parts(mlp: nn.Module) -> MlpParts | None:
    """The parts of one of timm's MLPs, or None when it is of another kind."""
    from timm.layers import GluMlp, Mlp, SwiGLU
    from timm.models.vitamin import GeGluMlp

    mlp = inside(mlp)
    if type(mlp) is Mlp:
        return PLAIN
    if type(mlp) is SwiGLU:
        return MlpParts(up=("fc1_g", "fc1_x"), down="fc2", norm="norm")
    if type(mlp) is GluMlp:
        return MlpParts(up=("fc1",), down="fc2", packed=2, norm="norm")
    if type(mlp) is GeGluMlp:  # its norm comes first, over what it reads
        return MlpParts(up=("w0", "w1"), down="w2")
    return None


def patch_convs(embed: nn.Module) -> tuple[LayerSite, ...]:
    """The convolutions that make patches: one, or a whole network in hybrid models."""
    return tuple(
        replace(site, key="patch", role="patch")
        if site.attribute == "proj"
        else replace(site, key=f"patch.{site.key}")
        for site in layers_in(embed, is_conv)
    )


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height, width."""
    height, width = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    stem: Any = next(layers_in(model.patch_embed, is_conv)).layer
    return (int(stem.weight.shape[1]), int(height), int(width))


def mlp_parts_of(blocks: Sequence[nn.Module]) -> MlpParts:
    """The parts of the MLPs of these blocks, some of which may be gone."""
    whole = whole_mlp(blocks, "mlp")
    return (None if whole is None else mlp_parts(whole)) or PLAIN


def _parts(blocks: Sequence[nn.Module]) -> BlockParts:
    scaled = (
        getattr(blocks[0], "ls1", None) is not None
    )  # blocks that normalize after have no scale
    return BlockParts(
        norm1="norm1",
        attention="attn",
        after1=("ls1", "drop_path1") if scaled else ("drop_path1",),
        norm2="norm2",
        mlp="mlp",
        after2=("ls2", "drop_path2") if scaled else ("drop_path2",),
        attention_parts=ATTENTION,
        mlp_parts=mlp_parts_of(blocks),
    )


def view(model: Any) -> Backbone:
    """See the model as sites."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    register_rules()
    first = next(blocks_in(model.blocks))[2]
    parts = _parts([block for _, _, block in blocks_in(model.blocks)])
    sites = assemble(model.blocks, parts)
    pool = layers_in(model.attn_pool, is_linear, "pool", "pool") if model.attn_pool else ()
    post = isinstance(first, ResPostBlock)
    reason = "its blocks normalize after the branches"
    missing = dict.fromkeys(("tokens", "width"), reason) if post else {}
    unplaced = _timm_positions.why_not(model, VisionTransformer, VisionTransformerDistilled)
    return Backbone(
        model=model,
        family="timm_vit",
        input_size=input_size(model),
        blocks=sites.blocks,
        linears=(*sites.linears, *pool),
        convs=patch_convs(model.patch_embed),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=None if post else _tokens(model, parts),
        positions=None if unplaced else _timm_positions.site(model, _timm_positions.PARTS),
        width=None if post else _timm_width.site(model, parts),
        classifier=last_layers(model, "head", "head_dist"),
        readouts=readouts(model, "head", "head_dist"),
        missing={**missing, "positions": unplaced} if unplaced else missing,
    )


def readouts(model: Any, *names: str) -> tuple[ReadoutSite, ...]:
    """Where a classifier is or could be; a distilled model has two, and averages what they say."""
    distilled = getattr(model, "dist_token", None) is not None
    return readouts_in(
        model,
        int(model.num_features),
        *names,
        dense=None if distilled else ((model, "global_pool", ""), (model, "attn_pool", None)),
        grid=model.patch_embed.grid_size,
        prefix=int(model.num_prefix_tokens),
    )


def _tokens(model: Any, parts: BlockParts) -> TokensSite:
    distilled = getattr(model, "dist_token", None) is not None
    return TokensSite(
        key="tokens",
        owner=model,
        attribute="blocks",
        parts=parts,
        class_tokens=int(model.cls_token is not None),
        distillation_tokens=int(distilled),
        register_tokens=int(model.num_prefix_tokens) - int(model.cls_token is not None) - distilled,
        pooling=POOLING.get(model.global_pool, "other"),
    )


def register_rules() -> None:
    """Teach the surgery timm's own norm classes."""
    from timm.layers import RmsNorm, RmsNormFp32, SimpleNorm, SimpleNormFp32

    if RmsNorm in keep_features.registry:
        return
    for kind in (RmsNorm, RmsNormFp32):
        masked_norm.register(kind, by_root_mean_square)

    @keep_features.register(RmsNorm)
    @keep_features.register(RmsNormFp32)
    @keep_features.register(SimpleNorm)
    @keep_features.register(SimpleNormFp32)
    def _(layer: Any, indices: Sequence[int]) -> None:
        if layer.weight is not None:
            select_parameter(layer, "weight", indices, 0)
        layer.normalized_shape = (len(indices),)
