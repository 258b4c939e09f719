"""First values and ranks that follow the activations of a few images (EVA, Paischer et al., 2024).

PEFT computes the directions of most variance of every layer's inputs and shares out a budget of
ranks among the layers. It does so for batches of words; here it is fed with images.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

from peft_vision.adapters._targets import split_paths
from peft_vision.adapters._variants import FOLDER
from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone, LayerSite, device_of
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.method import Evidence
from peft_vision.plan import Decisions

FIELD = "eva_config"
"""Field of PEFT's configuration that asks for it."""


PASSES = 50
"""How often the data may be gone through until the directions have settled."""


def directions(
    backbone: Backbone, sites: list[LayerSite], config: Any, evidence: Evidence
) -> dict[str, Tensor]:
    """Key of a layer -> its directions, rank x inputs; a layer may get none.

    Raises:
        BadSetting: there is no data, or too little in a batch.
    """
    if evidence.batches is None:
        raise BadSetting(
            "eva sets its first values by a few images; pass data=[(images, labels), ...]. "
            "Without data: pissa, olora, orthogonal."
        )
    linears = [site for site in sites if isinstance(site.layer, nn.Linear)]
    if len(linears) < len(sites):
        raise UnsupportedSite("eva acts on linears; targets has others. Possible: linears.")

    def compute() -> dict[str, Tensor]:
        model = copy.deepcopy(backbone.model)
        seen = view(model)
        seen.call_every_linear()
        device, dtype = device_of(model), _dtype(model)
        batches = [images.to(device, dtype) for images, *_ in evidence.batches or ()]
        keys = {site.key for site in linears}
        _check_batches(model, [s for s in seen.linears if s.key in keys], config, batches)
        found = peft.get_eva_state_dict(
            model,
            batches,
            config,
            forward_fn=_Patient(PASSES * max(1, len(batches))),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=_rows,
            show_progress_bar=False,
        )
        paths = split_paths(backbone, (site.key for site in linears))[0]
        return {site.key: found[path] for site, path in zip(linears, paths, strict=True)}

    return evidence.once(FIELD, compute)


def ranks(found: Mapping[str, Tensor], config: Any) -> Decisions:
    """Per layer with any direction, its rank, and the alpha that keeps the updates' scale."""
    scale = config.lora_alpha / config.r
    keep = config.eva_config.adjust_scaling_factors
    return {
        key: {"rank": len(rows), "alpha": scale * len(rows) if keep else float(config.lora_alpha)}
        for key, rows in found.items()
        if len(rows)
    }


def patterns(paths: Mapping[str, str], decisions: Decisions) -> dict[str, dict[str, Any]]:
    """PEFT's words for decisions that differ from layer to layer; empty where none do."""
    own = {k: v for k, v in decisions.items() if isinstance(v, dict) and "rank" in v and k in paths}
    if not own:
        return {}
    return {
        "rank_pattern": {f"^{re.escape(paths[k])}": v["rank"] for k, v in own.items()},
        "alpha_pattern": {f"^{re.escape(paths[k])}": v["alpha"] for k, v in own.items()},
    }


def put(backbone: Backbone, found: Mapping[str, Tensor]) -> None:
    """Write the directions into the layers that PEFT injected."""
    with torch.no_grad():
        for site in backbone.linears:
            if len(found.get(site.key, ())):
                down = getattr(site.layer, f"{FOLDER}_A")["default"].weight
                down.copy_(found[site.key])


class _Patient:
    """Calls a model, but not without end: PEFT goes on until every layer's directions settle."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise BadSetting(
                "eva's directions do not settle: some layer's inputs vary too little over the "
                "images. Pass more of them, a smaller r, or targets such as attention and mlp."
            )
        return model(images)


def _rows(inputs: Any, *_: Any) -> Tensor:
    tensor: Tensor = inputs[0] if isinstance(inputs, tuple | list) else inputs
    return tensor.flatten(0, -2).contiguous()


def _check_batches(
    model: nn.Module, sites: list[LayerSite], config: Any, batches: list[Tensor]
) -> None:
    """Refuse what PEFT would wait for without end: fewer rows in a batch than directions."""
    needed = round(config.r * config.eva_config.rho)
    narrow = min(int(site.layer.in_features) for site in sites)  # type: ignore[arg-type]
    if narrow < needed:
        raise BadSetting(f"eva looks for r * rho = {needed} directions of {narrow} inputs.")
    counts: list[int] = []
    hooks = [
        site.layer.register_forward_hook(lambda _, args, __: counts.append(len(_rows(args))))
        for site in sites
    ]
    try:
        with torch.no_grad():
            for images in batches[:1]:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not counts or min(counts) < needed:
        raise BadSetting(
            f"eva needs batches of at least r * rho = {needed} rows in every layer; the first "
            f"has {min(counts, default=0)}. Pass larger batches, or a smaller r or rho."
        )


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
