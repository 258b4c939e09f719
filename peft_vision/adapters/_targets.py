"""Which layers an adapter acts on: by kind, by part of the block, or by role, for every family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from peft_vision.backbones.sites import Backbone, LayerSite
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.ownership import plain_of
from peft_vision.layers.train_linear import TrainLinear

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "qkv", "out"),
    "mlp": ("up", "gate", "down"),
}
ROLES = ("q", "k", "v", "qkv", "out", "up", "gate", "down")


def check_targets(targets: Sequence[str]) -> None:
    """Refuse words that name no layers.

    Raises:
        BadSetting: some target is none of "auto", "linears", "convs", a group or a role.
    """
    known = {"auto", "linears", "convs", *GROUPS, *ROLES}
    if not targets or any(target not in known for target in targets):
        raise BadSetting(f"targets is {list(targets)!r}; possible: {', '.join(sorted(known))}.")


def chosen_layers(backbone: Backbone, targets: Sequence[str]) -> list[LayerSite]:
    """The layers that `targets` stand for in this backbone; never the classifier.

    Raises:
        UnsupportedSite: the backbone has none of them; the message names those it has.
    """
    wanted = {role for t in targets for role in GROUPS.get(t, (t,))}
    if "auto" in wanted:
        wanted |= _automatic(backbone)
    chosen: list[LayerSite] = []
    if "linears" in wanted:
        backbone.require("linears")
        chosen += backbone.linears
    else:
        chosen += [site for site in backbone.linears if site.role in wanted]
        dense = (site for site in backbone.convs if _is_dense(site.layer))
        chosen += [site for site in dense if site.role in wanted and "convs" not in wanted]
    if "convs" in wanted:
        backbone.require("convs")
        # Updates of grouped convolutions cannot be merged, depthwise ones outgrow the layer.
        chosen += [site for site in backbone.convs if _is_dense(site.layer)]
    if not chosen:
        found = sorted({site.role for site in backbone.linears})
        raise UnsupportedSite(
            f"{type(backbone.model).__name__} has none of the targets {list(targets)!r}. "
            f"Its linears are: {', '.join(found) or 'none'}."
        )
    for site in chosen:
        if isinstance(plain_of(site.layer), TrainLinear):
            raise UnsupportedSite(
                f"{site.key} is a train of cores, and no update of a matrix stands at one. Choose "
                "other targets, or adapt and merge first and factor what comes out."
            )
    return chosen


def _automatic(backbone: Backbone) -> set[str]:
    """The linears, and in models that compute mostly with convolutions those, too."""
    linears, convs = (sum(_size(s.layer) for s in k) for k in (backbone.linears, backbone.convs))
    if linears >= convs:
        return {"linears"}
    return {"linears", "convs"} if linears else {"convs"}


def _size(layer: nn.Module) -> int:
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    return 0 if weight is None else int(weight.numel())


def split_paths(backbone: Backbone, keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """Dotted paths, as PEFT names layers, of decided layers and of the classifier's among them.

    Raises:
        KeyError: a key names no site of the backbone.
    """
    names = {id(module): name for name, module in backbone.model.named_modules()}
    sites = {s.key: s for s in (*backbone.linears, *backbone.convs, *backbone.classifier)}
    heads = {site.key for site in backbone.classifier}
    paths = {key: _path(sites[key], names) for key in keys}
    return (
        [path for key, path in paths.items() if key not in heads],
        [path for key, path in paths.items() if key in heads],
    )


def exactly(backbone: Backbone, paths: Sequence[str]) -> list[str] | str:
    """Paths as PEFT takes them: a list, or a pattern where another module's name ends alike.

    PEFT takes a name of a list for the end of others, too: ``norm`` for ``blocks.0.attn.norm``.
    """
    wanted = set(paths)
    others = [name for name, _ in backbone.model.named_modules() if name not in wanted]
    alike = any(name.endswith(tuple(f".{path}" for path in wanted)) for name in others)
    return "|".join(re.escape(path) for path in paths) if alike else list(paths)


def _is_dense(layer: nn.Module) -> bool:
    """Whether PEFT has an update for it: it knows neither groups that merge nor dilation."""
    plain = getattr(layer, "base_layer", layer)
    spread = any(int(step) != 1 for step in getattr(plain, "dilation", ()))
    return getattr(plain, "groups", 1) == 1 and not spread


def _path(site: LayerSite, names: dict[int, str]) -> str:
    owner = names[id(site.owner)]
    return f"{owner}.{site.attribute}" if owner else site.attribute
