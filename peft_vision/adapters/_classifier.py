"""The classifier, trained in full beside what an adapter puts in."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones.sites import Backbone
from peft_vision.layers.ownership import parameters_of
from peft_vision.plan import Decisions

TRAIN = "train"


def classifier_decisions(backbone: Backbone) -> Decisions:
    """The key of each classifier, to be trained in full."""
    return {site.key: TRAIN for site in backbone.classifier}


def classifier_parameters(backbone: Backbone, decisions: Decisions) -> list[tuple[nn.Module, str]]:
    """(owner, attribute) of the parameters of the classifiers decided; not of PEFT's copies."""
    wanted = [site for site in backbone.classifier if decisions.get(site.key) == TRAIN]
    return [place for site in wanted for place in parameters_of(site.layer)]
