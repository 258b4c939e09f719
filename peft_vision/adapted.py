"""A model with adapters: a PeftModel that proves that every adapter trains."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from peft_vision.artifact import (
    ADAPTER,
    PARTS,
    RECORD,
    WEIGHTS,
    read_record,
    read_weights,
    write_record,
    write_weights,
)
from peft_vision.backbones import view
from peft_vision.cost import measure
from peft_vision.errors import BadSetting, DamagedArtifact, UnsupportedSite
from peft_vision.files import staged_folder, write_json_atomic, writing
from peft_vision.history import History
from peft_vision.hub import push_model
from peft_vision.layers.quantized import dequantize
from peft_vision.several import INSIDE, add_weighted, load_beside, renamed

CONFIG = "adapter_config.json"


class AdaptedModel(peft.PeftModel):
    """A backbone with adapters; calls like the model that went in.

    Attributes:
        history: where it came from and what was done; of the adapter named "default".
        beside: the same of the adapters that were loaded beside it, by their names.
    """

    def __init__(
        self, model: nn.Module, config: peft.PeftConfig | None, history: History, **kwargs: Any
    ) -> None:
        vars(model).pop("peft_config", None)  # of a wrapper that this one takes the place of
        config = config or peft.LoraConfig(target_modules=DUMMY_TARGET_MODULES)
        config.base_model_name_or_path = base_name(history)
        with warnings.catch_warnings():
            # PEFT still asks transformers models by the old name of their checkpointing switch.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # Of norms, which have no inputs and outputs to count; those of linears are counted.
            warnings.filterwarnings("ignore", "Unsupported layer type .*Norm", UserWarning)
            super().__init__(model, config, **kwargs)
        self.history = history
        self.beside: dict[str, History] = {}

    @property
    def plain_model(self) -> nn.Module:
        """The module inside, with its adapters in place."""
        inner: nn.Module = self.base_model.model
        return inner

    @property
    def injected(self) -> peft.PeftConfig | None:
        """What PEFT injected; None when all of the adapter is parts of our own."""
        config = self.peft_config["default"]
        none = getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES
        return None if none else config

    def parts(self) -> dict[str, nn.Parameter]:
        """Trained parameters that PEFT did not inject, by their names in the plain model."""
        backbone = view(self.plain_model)
        wanted = {
            id(getattr(owner, attribute))
            for method, step in self.history.adapters
            for owner, attribute in method.trained(backbone, step.decisions)
        }
        return {n: p for n, p in self.plain_model.named_parameters() if id(p) in wanted}

    def train_parts(self) -> None:
        """Have the parts trained; what PEFT injected is already."""
        for parameter in self.parts().values():
            parameter.requires_grad_(True)

    def foreign(self) -> str:
        """Why plain PEFT cannot carry this adapter to a plain base; empty when it can."""
        backbone = view(self.plain_model)
        if self.history.changed_structure:
            return "the base's structure was changed"
        for method, step in self.history.adapters:
            if reason := method.foreign(backbone, step.decisions):
                return f"{step.method}: {reason}"
        if backbone.bypassed:
            return (
                f"{type(backbone.core).__name__} reads the weights of its linears instead of "
                "calling them, and plain PEFT's adapters on them would do nothing"
            )
        trained = ", ".join(list(self.parts())[:2])
        return f"it trains {trained}, for which PEFT has no words" if trained else ""

    def dequantized(self) -> AdaptedModel:
        """A copy on plain layers with the weights that the adapter was trained beside."""
        whole = copy.deepcopy(self)
        parts = {name: p.detach().clone() for name, p in whole.parts().items()}
        tensors, config = whole.adapter_tensors(), copy.deepcopy(whole.injected)
        again = AdaptedModel(dequantize(whole.unload()), config, self.history.in_full_precision())
        again.load_tensors(tensors, parts)
        again.train_parts()
        return again.train(self.training)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """PEFT's, into weights in floating point: packed ones would round the updates away."""
        model = self.dequantized() if self.history.quantized else self
        plain: nn.Module = model.base_model.merge_and_unload(*args, **kwargs)
        return plain

    def load_adapter(self, model_id: Any, adapter_name: str, **kwargs: Any) -> Any:
        """Load a further adapter beside the first: a folder of ours, or what PEFT takes.

        It is active after ``set_adapter(adapter_name)``. The name "default" takes the first one's
        tensors from a folder of the same adapter, as a Trainer does when it resumes.

        Raises:
            DamagedArtifact: the folder is damaged.
            BadSetting, WrongBase, UnsupportedSite: it does not fit; see `several.load_beside`.
        """
        folder = Path(model_id).expanduser()
        if not (folder / RECORD).is_file():
            return super().load_adapter(model_id, adapter_name, **kwargs)
        if adapter_name == "default":
            content = read_record(folder)
            if History.of_record(content).plan != self.history.plan:
                raise BadSetting(
                    f"{folder} holds another adapter than the model. To have it beside the "
                    'model\'s own, choose another name than "default".'
                )
            load_adapter_weights(self, folder, str(content.get("prefix") or ""))
        else:
            self.beside[adapter_name] = load_beside(self, self.history, folder, adapter_name)
        return None

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, **options: Any
    ) -> None:
        """A further adapter: a weighted sum of others, the mean of their classifiers included.

        Args:
            options: of PEFT's LoraModel.add_weighted_adapter (combination_type, density ...).

        Raises:
            UnknownName: an adapter is not there. BadSetting: they cannot be combined.
        """
        add_weighted(self, adapters, weights, adapter_name, options)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set training mode, in all but the base's normalization by running figures.

        An adapter's folder does not hold these figures, and a frozen base keeps its own.
        """
        super().train(mode)
        for module in self.modules():
            frozen = not all(p.requires_grad for p in module.parameters())
            if isinstance(module, _BatchNorm) and (frozen or not module.affine):
                module.eval()
        return self

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute as the base does, for a while.

        Raises:
            UnsupportedSite: some part is in place that cannot be switched off.
        """
        parts = list(self.parts())
        if parts:
            raise UnsupportedSite(
                f"The adapter trains parts of the model itself ({', '.join(parts[:3])}) and cannot "
                "be switched off. Build the base beside it instead."
            )
        with super().disable_adapter():
            yield

    def save_pretrained(
        self, save_directory: str | Path, *, overwrite: bool = False, **kwargs: Any
    ) -> None:
        """Save the adapter as a plain PEFT folder, with `peft_vision.json` and a model card.

        Where the base's structure was changed too, its weights are saved beside the adapter. A
        folder that plain PEFT cannot carry to a plain base says so when plain PEFT opens it.

        Args:
            save_directory: the folder.
            overwrite: replace a folder that is there already.
            kwargs: what PEFT takes; with any of them (as a Trainer passes for its checkpoints) the
                files are put into the folder as it is.

        Raises:
            OutputExists: the folder holds something and `overwrite` is off.
            CannotWrite: the disk is full; an older folder is intact.
        """
        folder = Path(save_directory)
        if kwargs:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._write(folder, **kwargs)
            return
        with staged_folder(folder, overwrite=overwrite) as stage:
            self._write(stage)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save and upload; see `peft_vision.hub.push_model`."""
        return push_model(self, repo_id, **kwargs)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What PEFT injected, by PEFT's names."""
        return dict(get_peft_model_state_dict(self, save_embedding_layers=False))

    def load_tensors(self, injected: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Put tensors into what PEFT injected and into the parts; each has to find its place.

        Raises:
            DamagedArtifact: one does not, or one is lacking.
        """
        try:
            result = set_peft_model_state_dict(self, dict(injected))
        except (KeyError, RuntimeError) as error:
            raise DamagedArtifact(
                f"The adapter's tensors and its places do not match: {error}"
            ) from error
        own = self.parts()
        lost = [*result.unexpected_keys, *(own.keys() ^ parts.keys())]
        if lost or self.adapter_tensors().keys() - set(injected):
            raise DamagedArtifact(
                f"The adapter's tensors and its places do not match, first {lost[:3]}."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != parts[name].shape:
                    raise DamagedArtifact(
                        f"{name} is {tuple(parts[name].shape)} in the folder and "
                        f"{tuple(parameter.shape)} in the model."
                    )
                parameter.copy_(parts[name])

    def _write(self, folder: Path, **kwargs: Any) -> None:
        if not kwargs.get("is_main_process", True):
            return
        # "auto" would ask the Hub for the base's vocabulary.
        super().save_pretrained(str(folder), save_embedding_layers=False, **kwargs)
        changed, parts = self.history.changed_structure, self.parts()
        if changed:
            write_weights(folder / WEIGHTS, self.plain_model.state_dict())
        elif parts:
            write_weights(folder / PARTS, dict(parts))
        if foreign := self.foreign():
            # PEFT keeps adapters beside the first in folders of their names.
            places = (folder, *(folder / name for name in self.peft_config))
            _refuse_plain_peft([place / CONFIG for place in places], foreign)
        kind, cost = "compressed" if changed else "adapter", self._cost()
        write_record(folder, kind, self.history, cost, self.plain_model, foreign)
        for name, history in self.beside.items():
            if (folder / name).is_dir():
                write_record(folder / name, "adapter", history, cost, self.plain_model, foreign)

    def _cost(self) -> dict[str, Any] | None:
        return measure(self.plain_model).to_json() if view(self.plain_model).input_size else None


def _refuse_plain_peft(configs: Sequence[Path], reason: str) -> None:
    """Have plain PEFT fail with a reason: it looks its type up in a table, and shows the key."""
    for config in configs:
        if config.is_file():
            content = json.loads(config.read_text())
            content["peft_type"] = f"PEFT_VISION: open this folder with peft_vision.load ({reason})"
            write_json_atomic(config, content)


def base_name(history: History) -> str | None:
    """The base's name as a user would type it."""
    source = history.source
    return f"{source['source']}/{source['name']}" if source and source.get("name") else None


def load_adapter_weights(model: AdaptedModel, folder: Path, prefix: str) -> None:
    """Put the adapter's tensors of a folder into `model`; every one has to find its place.

    Args:
        prefix: the backbone's name within the model that was saved (see `Backbone.prefix`); the
            model at hand may have another, or none.
    """
    own = view(model.plain_model).prefix
    parts = read_weights(folder / PARTS) if (folder / PARTS).is_file() else {}
    injected = renamed(read_weights(folder / ADAPTER), INSIDE + prefix, INSIDE + own)
    model.load_tensors(injected, renamed(parts, prefix, own))
