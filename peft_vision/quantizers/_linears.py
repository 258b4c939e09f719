"""What quantizers of linear layers share: which layers, what is refused, and the error made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, get_args

from torch import nn

from peft_vision.backbones.sites import Backbone, LayerSite, Role
from peft_vision.errors import BadSetting, MissingExtra, UnsupportedSite
from peft_vision.layers.quantized import Quantized, relative_error
from peft_vision.plan import Decisions, Json

Pack: TypeAlias = Callable[[nn.Linear], Quantized]
"""Makes a quantized layer of a dense one."""

EVERY = "linears"
ROLES = tuple(role for role in get_args(Role) if role not in {"patch", "pool"})


def require_bitsandbytes(name: str) -> None:
    """Refuse a quantizer whose library is not installed.

    Raises:
        MissingExtra: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(
            f"{name} needs bitsandbytes, which is not installed. "
            'Install it with: pip install "peft-vision[quantize]"'
        )


def check_targets(targets: Sequence[str]) -> None:
    """Refuse words that name no linear layers.

    Raises:
        BadSetting: some target is neither "linears" nor a role.
    """
    known = (EVERY, *ROLES)
    if not targets or any(target not in known for target in targets):
        raise BadSetting(f"targets is {list(targets)!r}; possible: {', '.join(known)}.")


def decide_errors(name: str, backbone: Backbone, targets: Sequence[str], pack: Pack) -> Decisions:
    """Per chosen layer the error that rounding makes; never the classifier or the patch embedding.

    Layers on `meta` have no numbers and no error.

    Raises:
        UnsupportedSite: the backbone has none of the targets, or one holds no plain linear.
    """
    backbone.require(EVERY)
    chosen = [
        site
        for site in backbone.linears
        if site.role in ROLES and (EVERY in targets or site.role in targets)
    ]
    if not chosen:
        found = sorted({site.role for site in backbone.linears})
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has none of the targets {list(targets)!r}. "
            f"Its linears are: {', '.join(found)}."
        )
    return {site.key: _error(layer, pack) for site, layer in _plain(name, chosen)}


def _error(layer: nn.Linear, pack: Pack) -> Json:
    if layer.weight.is_meta:
        return {}
    return {"error": round(relative_error(layer.weight, pack(layer)), 6)}


def put_in_place(name: str, backbone: Backbone, keys: Iterable[str], pack: Pack) -> None:
    """Replace the layers of these sites, in place, and tell PEFT.

    Raises:
        UnsupportedSite: one holds no plain linear; then nothing has been replaced.
    """
    sites = {site.key: site for site in backbone.linears}
    backbone.call_every_linear()
    for site, layer in list(_plain(name, [sites[key] for key in keys])):
        packed = pack(layer)
        setattr(site.owner, site.attribute, packed)
        # PEFT asks the model, not the layer, and would inject layers that cannot read the weight.
        setattr(backbone.model, packed.flag, True)


def _plain(name: str, sites: Iterable[LayerSite]) -> Iterable[tuple[LayerSite, nn.Linear]]:
    found: list[tuple[LayerSite, nn.Linear]] = []
    for site in sites:
        layer = site.layer
        if type(layer) is not nn.Linear:
            raise UnsupportedSite(f"{name} cannot pack {site.key}: {_why(name, layer)}")
        found.append((site, layer))
    return found


def _why(name: str, layer: nn.Module) -> str:
    kind = type(layer).__name__
    if isinstance(layer, Quantized):
        return f"it is a {kind} and holds fewer bits already. Quantize the full weights once."
    if getattr(layer, "base_layer", None) is not None:
        return (
            f"it carries an adapter ({kind}), which was trained beside the full weight. Quantize "
            f"first, wrap(model, method, quantize={name!r}), or merge first and quantize the "
            "merged model."
        )
    return f"it is a {kind}, and only a plain nn.Linear has a rule."
