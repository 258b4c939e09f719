"""transformers' DINOv2, with registers and without, with a classifier and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from peft_vision.backbones.assembly import (
    ABSENT,
    assemble,
    find_blocks,
    lacking,
    last_layers,
    size_in_config,
)
from peft_vision.backbones.sites import Backbone, LayerSite, TokensSite
from peft_vision.layers.attention import AttentionParts
from peft_vision.layers.block import BlockParts
from peft_vision.layers.mlp import MlpParts
from peft_vision.layers.trunk import blocks_in

MODULES = (
    "transformers.models.dinov2.modeling_dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
)

PLAIN = MlpParts(up=("fc1",), down="fc2")
GATED = MlpParts(up=("gate_proj", "up_proj"), down="down_proj")

PARTS = BlockParts(
    norm1="norm1",
    attention="attention",
    after1=("layer_scale1", "drop_path"),
    norm2="norm2",
    mlp="mlp",
    after2=("layer_scale2", "drop_path"),
    attention_parts=AttentionParts(
        qkv=("q_proj", "k_proj", "v_proj"),
        out="o_proj",
        heads=("num_attention_heads",),
        dropout="attention_dropout",
    ),
    mlp_parts=PLAIN,
    mask="attention_mask",
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood in full; empty when nothing does."""
    found = _blocks(model)
    if not found:
        return "it has no list of DINOv2 layers"
    container = getattr(*found)
    return lacking(container, _parts(container))


def _blocks(model: nn.Module) -> tuple[nn.Module, str] | None:
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
    from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
        Dinov2WithRegistersLayer,
    )

    return find_blocks(model, Dinov2Layer) or find_blocks(model, Dinov2WithRegistersLayer)


def _parts(container: nn.Module) -> BlockParts:
    mlp = getattr(next(blocks_in(container))[2], PARTS.mlp, None)
    gated = getattr(mlp, GATED.down, ABSENT) is not ABSENT
    return replace(PARTS, mlp_parts=GATED if gated else PLAIN)


def view(model: Any) -> Backbone:
    """See the model as sites."""
    found = _blocks(model)
    if found is None:
        raise AssertionError("why_not() admits models with blocks only")
    parts = _parts(getattr(*found))
    sites = assemble(getattr(*found), parts)
    embeddings = next(m for m in model.modules() if getattr(m, "cls_token", None) is not None)
    maps = getattr(model, "out_features", None) is not None
    return Backbone(
        model=model,
        family="hf_dinov2",
        input_size=size_in_config(model.config),
        blocks=sites.blocks,
        linears=sites.linears,
        convs=(LayerSite("patch", embeddings.patch_embeddings, "projection", "patch"),),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=None if maps else _tokens(model, found, parts),
        classifier=last_layers(model, "classifier"),
        missing={"tokens": "its feature maps need every patch"} if maps else {},
    )


def _tokens(model: Any, found: tuple[nn.Module, str], parts: BlockParts) -> TokensSite:
    # The classifiers read the class token beside the mean of the patches.
    classifies = "classifier" in dict(model.named_children())
    return TokensSite(
        "tokens",
        *found,
        parts,
        class_tokens=1,
        register_tokens=int(getattr(model.config, "num_register_tokens", 0)),
        pooling="class+average" if classifies else "class",
    )
