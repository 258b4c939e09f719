"""Visual prompt tuning (Jia et al., ECCV 2022): learned tokens beside those of the image.

The prompts stand behind the class, distillation and register tokens and before the patches. The
deep variant gives every block its own, in the place of those of the block before. Behind the last
block they are removed: what is pooled is what was pooled before. A head that reads the class token
alone sees the same whether they are removed or not, as in the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft_vision.adapters._classifier import classifier_decisions, classifier_parameters
from peft_vision.backbones.sites import Backbone, device_of
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.ownership import plain_of, trained_dtype
from peft_vision.layers.prompts import Prompts
from peft_vision.method import Adapter, Evidence, check_range
from peft_vision.plan import Decisions


@dataclass(frozen=True)
class Vpt(Adapter):
    """Learned tokens join the patches in a frozen backbone; the classifier is trained with them."""

    tokens: int = 10
    """How many prompts a block sees, at least 1."""

    deep: bool = True
    """Every block has prompts of its own; otherwise those of the first block go through all."""

    dropout: float = 0.0
    """Dropout on the prompts, in [0, 1)."""

    train_head: bool = True
    """Train the classifier in full and save it with the prompts."""

    keeps_function: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise BadSetting(f"tokens is {self.tokens!r}; it has to be a whole number from 1 up.")
        check_range("dropout", self.dropout, 0.0, 0.999)

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per block with prompts, how many; the classifiers' keys."""
        if strength <= 0:
            return {}
        backbone.require("tokens")
        present = backbone.tokens.trunk_if_any() if backbone.tokens else None
        if present is not None and len(present.prompts):
            raise UnsupportedSite(
                f"{type(backbone.model).__name__} carries prompts already. Merge does not remove "
                "them; start from the plain model."
            )
        sizes = {"count": self.tokens, "width": _width(backbone), "bound": _bound(backbone)}
        depth = len(backbone.blocks) if self.deep else 1
        return {
            **{_key(i): dict(sizes) for i in range(depth)},
            **(classifier_decisions(backbone) if self.train_head else {}),
        }

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Open the blocks' trunk and put the prompts in."""
        backbone.require("tokens")
        inserted: dict[int, Prompts] = {}
        for key, decision in decisions.items():
            if not isinstance(decision, dict):
                continue
            count, width = int(decision["count"]), int(decision["width"])  # type: ignore[arg-type]
            with torch.device(device_of(backbone.model)):
                prompts = Prompts(count, width, self.dropout).to(trained_dtype(backbone.model))
            inserted[int(key.split(".")[1])] = prompts.train(backbone.model.training)
        if backbone.tokens is not None:
            backbone.tokens.trunk().insert(inserted)

    def start(self, backbone: Backbone, decisions: Decisions) -> None:
        """Uniform, in the bounds that Xavier's rule gives for the patch embedding."""
        for key, prompts in _present(backbone).items():
            decision = decisions.get(key)
            if isinstance(decision, dict):
                prompts.draw(float(decision["bound"]))  # type: ignore[arg-type]

    def trained(self, backbone: Backbone, decisions: Decisions) -> list[tuple[nn.Module, str]]:
        """The prompts, and the classifier unless PEFT trains a copy of it."""
        own = [prompts for key, prompts in _present(backbone).items() if key in decisions]
        return [
            *((prompts, "tokens") for prompts in own),
            *classifier_parameters(backbone, decisions),
        ]

    def fold(self, backbone: Backbone, decisions: Decisions) -> bool:
        """Tokens of the sequence have no place in the weights: they stay."""
        return False

    def foreign(self, backbone: Backbone, decisions: Decisions) -> str:
        """PEFT's prompts are those of language models."""
        return "PEFT's prompts are put before words, not beside patches"


def _key(block: int) -> str:
    return f"blocks.{block}.prompts"


def _present(backbone: Backbone) -> dict[str, Prompts]:
    trunk = backbone.tokens.trunk_if_any() if backbone.tokens else None
    items = trunk.prompts.items() if trunk is not None else ()
    return {_key(int(name)): p for name, p in items if isinstance(p, Prompts)}


def _width(backbone: Backbone) -> int:
    out = next(site for site in backbone.linears if site.role == "out")
    return int(plain_of(out.layer).out_features)  # type: ignore[arg-type]


def _bound(backbone: Backbone) -> float:
    """sqrt(6 / (numbers of a patch + width)), as in the authors' code."""
    stem = next((site for site in backbone.convs if site.role == "patch"), None)
    weight = plain_of(stem.layer).weight if stem else None
    pixels = weight[0].numel() if isinstance(weight, torch.Tensor) else 0
    return math.sqrt(6 / (pixels + _width(backbone)))
