"""transformers' models of images and text: the vision tower is seen, and what projects from it.

Text is never touched. What `get_image_features` gives is what a budget counts and what a gradient
is proven on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.backbones import view as view_of_any
from peft_vision.backbones.assembly import is_linear, layers_in
from peft_vision.backbones.sites import Backbone, LayerSite

MODULES = (
    "transformers.models.clip.modeling_clip",
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.chinese_clip.modeling_chinese_clip",
    "transformers.models.metaclip_2.modeling_metaclip_2",
    "transformers.models.llava.modeling_llava",
    "transformers.models.paligemma.modeling_paligemma",
)
TOWERS = ("vision_model", "vision_tower")
PROJECTORS = ("visual_projection", "multi_modal_projector")


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    kind = type(model).__name__
    if getattr(model, "get_image_features", None) is None:
        return "its architecture is not one of those understood in full"
    return "" if _tower(model) else f"{kind} holds none of {', '.join(TOWERS)}"


def view(model: Any) -> Backbone:
    """See the vision tower and the projection behind it; names of layers begin with the tower's."""
    path, owner = _tower(model)
    seen = view_of_any(model.get_submodule(path))
    projecting = tuple(_projectors(owner))
    every_patch = any(site.key.startswith("multi_modal_projector") for site in projecting)
    used = _used(model, len(seen.blocks)) if every_patch else len(seen.blocks)
    within = (s for s in seen.linears if s.block is not None and s.block < used)
    return replace(
        seen,
        model=model,
        prefix=f"{path}.",
        blocks=seen.blocks[:used],
        linears=(*(within if every_patch and seen.blocks else seen.linears), *projecting),
        heads=tuple(site for site in seen.heads if site.block < used),
        hidden=tuple(site for site in seen.hidden if site.block < used),
        tokens=None if every_patch else seen.tokens,
        positions=None,
        width=None,
        classifier=(),
        readouts=(),
        run=image_features,
        missing={**seen.missing, **_missing(type(model).__name__, every_patch=every_patch)},
    )


def image_features(model: Any, images: Tensor) -> Tensor:
    """What the model makes of images alone: B D, or one row per patch and image."""
    found = model.get_image_features(pixel_values=images)
    pooled = found if isinstance(found, Tensor) else found.pooler_output
    if isinstance(pooled, Tensor):
        return pooled
    return torch.stack(tuple(pooled))


def _tower(model: nn.Module) -> Any:
    """(path of the vision tower, module that holds it), or None."""
    for path in (f"{owner}{name}" for owner in ("", "model.") for name in TOWERS):
        owner, _, _ = path.rpartition(".")
        holder = dict(model.named_modules()).get(owner)
        if holder is not None and path.rpartition(".")[2] in dict(holder.named_children()):
            return path, holder
    return None


def _projectors(owner: nn.Module) -> list[LayerSite]:
    """The linears between the tower and the text."""
    found: list[LayerSite] = []
    for name, child in owner.named_children():
        if name in PROJECTORS:
            alone = is_linear(child)
            found += (
                [LayerSite(name, owner, name, "other")]
                if alone
                else layers_in(child, is_linear, name)
            )
    return found


def _used(model: Any, depth: int) -> int:
    """How many blocks come before what the text model is given; later ones are run in vain."""
    said = getattr(model.config, "vision_feature_layer", None)
    if said is None:
        return depth
    layers = [said] if isinstance(said, int) else list(said)
    return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)


def _missing(kind: str, *, every_patch: bool) -> dict[str, str]:
    alone = f"{kind} is more than its vision tower; pass the tower alone (its {TOWERS[0]})"
    found = dict.fromkeys(("width", "positions", "readouts"), alone)
    if every_patch:
        found["tokens"] = "its language model is given every patch, and counts them"
    return found
