"""The residual stream of timm's transformers."""

from __future__ import annotations

from typing import Any

from peft_vision.backbones.width import WidthSite, in_blocks, modules, tensors
from peft_vision.layers.block import BlockParts
from peft_vision.layers.trunk import blocks_in

TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")
HEADS = ("head", "head_dist")


def site(model: Any, parts: BlockParts, *, opens: bool = False) -> WidthSite:
    """The stream of a model whose blocks normalize before their branches.

    Args:
        opens: its attention modules take their heads to make up the width.
    """
    blocks = in_blocks(model.blocks, parts)
    pooled = model.attn_pool is not None
    said = ("embed_dim",) if pooled else ("embed_dim", "num_features", "head_hidden_size")
    last = ("norm",) if pooled else ("norm", "fc_norm")
    return WidthSite(
        key="width",
        model=model,
        patch=(model.patch_embed, "proj"),
        norms=(*blocks.norms, *modules(model, last)),
        other_norms=(*modules(model.patch_embed, ("norm",)), *modules(model, ("norm_pre",))),
        inputs=(*blocks.inputs, *(() if pooled else modules(model, HEADS))),
        outputs=blocks.outputs,
        tables=(*tensors(model, TOKENS), *blocks.tables),
        numbers=tuple((model, name) for name in said),
        pools=((model, "attn_pool"),) if pooled else (),
        opens=tuple(
            (block, parts.attention, parts.attention_parts)
            for _, _, block in blocks_in(model.blocks)
            if opens
        ),
    )
