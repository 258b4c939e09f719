"""Vision models of transformers, by repository or local folder."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from peft_vision.errors import ArtifactError
from peft_vision.lookup import unknown

MODULES = ("transformers.models",)


def names() -> list[str]:
    """Repositories cannot be listed."""
    return []


def build(spec: dict[str, Any], *, weights: bool) -> nn.Module:
    """Build from a class and its configuration, or from a repository by name.

    Raises:
        UnknownName: transformers has no such class.
        ArtifactError: the repository or folder cannot be read.
    """
    import transformers

    if "class" not in spec:
        return _from_repository(str(spec["name"]), dict(spec.get("kwargs", {})), weights)
    cls: Any = getattr(transformers, str(spec["class"]), None)
    if not (inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedModel)):
        raise unknown("transformers model class", str(spec["class"]), dir(transformers))
    if weights:
        return _from_repository(str(spec["name"]), {}, weights, cls)
    return _from_config(cls, spec)


def _from_config(cls: Any, spec: dict[str, Any]) -> nn.Module:
    config = cls.config_class.from_dict(dict(spec["config"]))
    model: nn.Module = cls(config, **dict(spec.get("kwargs", {}))).eval()
    return model


def spec_of(model: Any) -> dict[str, Any] | None:
    """The class and its whole configuration."""
    import transformers

    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        return None
    kwargs = {}
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        kwargs["add_pooling_layer"] = getattr(model, "pooler", None) is not None
    return {
        "source": "transformers",
        "class": name,
        "name": model.config._name_or_path,  # noqa: SLF001
        "config": _plain(model.config.to_dict()),
        "kwargs": kwargs,
    }


def _from_repository(
    name: str, kwargs: dict[str, Any], weights: bool, cls: Any = None
) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, **kwargs)
        if cls is None:
            named = [getattr(transformers, n, None) for n in config.architectures or []]
            auto = transformers.AutoModelForImageClassification
            cls = next((c for c in named if c is not None and "num_labels" not in kwargs), auto)
        if weights:
            # A head for other classes starts anew; everything else has to fit.
            anew = "num_labels" in kwargs
            loaded: nn.Module = cls.from_pretrained(
                name, config=config, ignore_mismatched_sizes=anew
            )
            return loaded
        built: nn.Module = cls.from_config(config) if cls is auto else cls(config)
        return built.eval()
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"transformers/{name} cannot be loaded: {str(error).splitlines()[0]} Possible: a "
            "repository of the Hub (needs a connection), or a folder with config.json."
        ) from error


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    import json

    return dict(json.loads(json.dumps(config, default=str)))
