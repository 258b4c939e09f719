"""The residual stream of transformers' vision models."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vision.backbones.sites import LayerSite
from peft_vision.backbones.width import WidthSite, in_blocks, modules, tensors
from peft_vision.layers.block import BlockParts

TABLES = ("cls_token", "class_embedding", "mask_token", "register_tokens", "position_embeddings")
TABLE_LAYERS = ("position_embedding",)
BEFORE, BEHIND = ("pre_layrnorm",), ("layernorm", "norm", "post_layernorm")
CLASSIFIERS = ("classifier", "visual_projection")


def site(
    model: Any, blocks: tuple[nn.Module, str], parts: BlockParts, patch: LayerSite
) -> WidthSite:
    """The stream of a model whose blocks normalize before their branches.

    Args:
        blocks: (owner, attribute) of the list of blocks.
        patch: the convolution that embeds patches.
    """
    inside = in_blocks(getattr(*blocks), parts)
    embeddings = next(m.embeddings for m in model.modules() if _has(m, "embeddings"))
    base = next(m for m in model.modules() if any(_has(m, name) for name in BEHIND))
    pooler = modules(base, ("pooler",))
    return WidthSite(
        key="width",
        model=model,
        patch=(patch.owner, patch.attribute),
        norms=(*inside.norms, *modules(base, BEHIND)),
        other_norms=modules(base, BEFORE),
        inputs=(
            *inside.inputs,
            *(held for owner, name in pooler for held in modules(getattr(owner, name), ("dense",))),
            *modules(model, CLASSIFIERS),
        ),
        outputs=(*inside.outputs, *modules(embeddings, TABLE_LAYERS)),
        tables=(*tensors(embeddings, TABLES), *inside.tables),
        pools=modules(base, ("head",)),
    )


def _has(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_children())
