"""transformers' SigLIP vision tower, alone or with a classifier: no class token."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vision.backbones import _hf_towers, _hf_width
from peft_vision.backbones.assembly import (
    assemble,
    find_blocks,
    is_linear,
    lacking,
    last_layers,
    layers_in,
    readouts_in,
    size_in_config,
)
from peft_vision.backbones.sites import Backbone, LayerSite, Pooling, TokensSite
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.block import BlockParts
from peft_vision.layers.mlp import MlpParts

MODULES = ("transformers.models.siglip.modeling_siglip",)

PARTS = BlockParts(
    norm1="layer_norm1",
    attention="self_attn",
    after1=(),
    norm2="layer_norm2",
    mlp="mlp",
    after2=(),
    attention_parts=AttentionParts(
        qkv=("q_proj", "k_proj", "v_proj"),
        out="out_proj",
        heads=("num_heads",),
        dropout="dropout",
    ),
    mlp_parts=MlpParts(up=("fc1",), down="fc2"),
    mask="attention_mask",
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood in full; empty when nothing does."""
    from transformers.models.siglip.modeling_siglip import (
        SiglipForImageClassification,
        SiglipVisionModel,
    )

    if not isinstance(model, SiglipVisionModel | SiglipForImageClassification):
        return "it has a text tower; pass the vision tower alone (model.vision_model)"
    found = _blocks(model)
    return lacking(getattr(*found), PARTS) if found else "it has no list of SiglipEncoderLayer"


def _blocks(model: nn.Module) -> tuple[nn.Module, str] | None:
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

    return find_blocks(model, SiglipEncoderLayer)


def view(model: Any) -> Backbone:
    """See the model as sites."""
    from transformers.models.siglip.modeling_siglip import (
        SiglipForImageClassification,
        SiglipVisionEmbeddings,
    )

    found = _blocks(model)
    if found is None:
        raise AssertionError("why_not() admits models with blocks only")
    vision = getattr(model.config, "vision_config", model.config)
    sites = assemble(getattr(*found), PARTS)
    embeddings = next(m for m in model.modules() if isinstance(m, SiglipVisionEmbeddings))
    # The classifier averages the patches: the pooling head that the tower carries is not read.
    classifies = isinstance(model, SiglipForImageClassification)
    pool = None if classifies else dict(model.named_children()).get("head")
    pooling: Pooling = "average" if classifies else "none" if pool is None else "attention"
    patch = LayerSite("patch", embeddings, "patch_embedding", "patch")
    return Backbone(
        model=model,
        family="hf_siglip",
        input_size=size_in_config(vision),
        blocks=sites.blocks,
        linears=(*sites.linears, *(layers_in(pool, is_linear, "pool", "pool") if pool else ())),
        convs=(patch,),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=TokensSite("tokens", *found, PARTS, 0, pooling=pooling),
        positions=_hf_towers.site(model, found, 0),
        width=_hf_width.site(model, found, PARTS, patch),
        classifier=last_layers(model, "classifier"),
        readouts=readouts_in(model, vision.hidden_size, "classifier"),
    )
