"""Channels that can be removed from any model: found by running it once on `meta`.

Channels of a convolution, or units of a linear, are coupled through all that they meet on their
way: norms, gates, residual sums, concatenations, the layers that read them (Fang et al.,
"DepGraph", 2023). A site holds units that go one by one, each from the same weights. What the run
does not make certain stays: `_channel_layout` and `_channel_sums` are what is
understood, `_channel_proof` is the proof.
"""

from __future__ import annotations

from peft_vision.backbones._channel_proof import proven
from peft_vision.backbones._channel_sites import ChannelsSite, keep_channels
from peft_vision.backbones.sites import Backbone

__all__ = ["ChannelsSite", "channels", "keep_channels"]


def channels(backbone: Backbone) -> tuple[ChannelsSite, ...]:
    """Every group of channels that can be removed, in the order of the model's weights.

    Raises:
        UnsupportedSite: the model cannot be run on `meta`, or no group could be told apart.
    """
    return proven(backbone)
