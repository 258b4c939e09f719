"""Which modules of a model are attention, MLP, norm, embedding and head, by its view."""

from __future__ import annotations

import re

from torch import nn

from peft_vision.backbones import view
from peft_vision.cost import unwrap

ATTENTION = "activations, attention"
MLP = "activations, mlp"
NORM = "activations, norms"
RESIDUAL = "activations, residual"
EMBEDDING = "activations, embedding"
HEAD = "activations, head"
OTHER = "activations, other"
NORMS = re.compile("Norm")


def places_of(model: nn.Module) -> dict[int, str]:
    """Identity of a module -> the kind of activations that its forward makes.

    What a module calls counts as its own unless it has a kind itself. What a block does outside of
    attention, MLP and norms is to add onto the residual stream.
    """
    plain = unwrap(model)
    backbone = view(plain)
    found = {id(module): NORM for module in plain.modules() if NORMS.search(type(module).__name__)}
    found.update({id(site.block): RESIDUAL for site in backbone.blocks})
    found.update({id(getattr(site.owner, site.attribute)): ATTENTION for site in backbone.heads})
    found.update({id(getattr(site.owner, site.attribute)): MLP for site in backbone.hidden})
    for layer in (*backbone.linears, *backbone.convs):
        if layer.role == "patch":
            found.update({id(layer.layer): EMBEDDING, id(layer.owner): EMBEDDING})
    found.update({id(site.layer): HEAD for site in backbone.classifier})
    found.update({id(plain): OTHER, id(backbone.core): OTHER})
    return found
