"""Training what a method fills in before it decides, and settling it.

`prepare` trains for `compress`; `settle` is for a model that its user wrapped and trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from peft_vision.backbones import view
from peft_vision.budget import parse_one
from peft_vision.compressed import CompressedModel
from peft_vision.cost import input_size, measure, unwrap
from peft_vision.data import preprocessing
from peft_vision.data.image_set import ImageSet, TensorSet
from peft_vision.data.images import limited
from peft_vision.data.settings import Augmentation
from peft_vision.data.source import Split
from peft_vision.errors import BadSetting, BudgetUnreachable, DataError, UnsupportedBackbone
from peft_vision.history import History
from peft_vision.layers.gate_control import controller_in
from peft_vision.merging import merge
from peft_vision.method import Evidence, Trained, make
from peft_vision.plan import Decisions, Plan, Step
from peft_vision.pricing import Pricing
from peft_vision.search import meets, search
from peft_vision.tasks.classification import logits_of
from peft_vision.tasks.task import Batch, Task
from peft_vision.training.fit import fit
from peft_vision.training.settings import TrainSettings
from peft_vision.wrapping import is_adapted

STEPS = 400
"""Of a method that does not say how many it plans with."""


@dataclass(frozen=True)
class Imitation(Task):
    """Give what the dense model gives: its softened logits, or its features where it has no head.

    Attributes:
        weight: of the teacher's term, in [0, 1]; the labels' term gets the rest.
        temperature: softens both distributions, above 0.
        classifies: outputs are logits.
        teacher: the dense model, frozen.
    """

    weight: float = 1.0
    temperature: float = 2.0
    classifies: bool = True
    teacher: nn.Module | None = None

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The divergence from the teacher and, with a weight below 1, cross entropy."""
        if self.teacher is None:
            raise AssertionError("fit() gives the teacher")
        given = self._read(model(batch["pixel_values"]))
        with torch.no_grad():
            taught = self._read(self.teacher(batch["pixel_values"]))
        if not self.classifies:
            spread = taught.var().clamp_min(1e-12)
            return {"teacher": functional.mse_loss(given, taught) / spread}
        heat = self.temperature
        divergence = functional.kl_div(
            functional.log_softmax(given / heat, dim=-1),
            functional.log_softmax(taught / heat, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        losses = {"teacher": self.weight * heat**2 * divergence}
        if self.weight < 1:
            labels = functional.cross_entropy(given, batch["labels"])
            losses["labels"] = (1 - self.weight) * labels
        return losses

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs in float32, and the labels."""
        return self._read(model(batch["pixel_values"])), batch["labels"]

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """How many there were."""
        return {"n": float(len(outputs))}

    def with_teacher(self, teacher: nn.Module) -> Imitation:
        """The same task with a frozen teacher in evaluation mode."""
        return replace(self, teacher=teacher.eval().requires_grad_(False))

    def _read(self, output: Any) -> Tensor:
        return (logits_of(output) if self.classifies else _features_of(output)).float()


def _features_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("pooler_output", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise UnsupportedBackbone(
        f"The model returned a {type(output).__name__} with neither logits nor features to imitate."
    )


def prepare(
    model: nn.Module,
    method: Trained,
    data: Any,
    target: float,
    *,
    epochs: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    image_size: tuple[int, int] | int | None = None,
) -> Any:
    """Have a method trained on a model, in place, and settle it.

    Args:
        model: a plain model; it is left in evaluation mode, settled, with all of its units.
        method: what is attached and trained, distilled from the model as it is now.
        data: batches of images B 3 H W, or (images, labels) pairs; or images that are open already.
            Without labels the model is distilled alone.
        target: share of the multiply-accumulates that is to be left, in (0, 1].
        epochs: over the images that the method uses; None: as many as make the steps that the
            method plans with.
        learning_rate: of weights; the method says how much faster its own parameters learn.
        image_size: for models that do not say theirs.

    Returns:
        What was learned, for `Evidence.learned`.

    Raises:
        DataError: there are no images. UnsupportedSite: the method cannot act on this model.
    """
    teacher = copy.deepcopy(model).eval()
    images, labeled = _images(model, data, image_size, seed, getattr(method, "data_share", 1.0))
    method.attach(view(model), target)
    control = controller_in(model)
    each = math.ceil(len(images) / batch_size)  # type: ignore[arg-type]
    rounds = math.ceil(getattr(method, "steps", STEPS) / each) if epochs is None else epochs
    if control is not None:
        control.plan(rounds * each)
    trains_weights = control is None or bool(set(control.thawed) & _trained(model))
    task = Imitation(
        weight=0.5 if labeled and trains_weights else 1.0,
        classifies=bool(view(model).classifier),
    )
    settings = TrainSettings(
        epochs=rounds,
        batch_size=min(batch_size, len(images)),  # type: ignore[arg-type]
        learning_rate=learning_rate,
        weight_decay=0.0,
        warmup=0.0,
        loggers=[],
        progress=False,
    )
    fit(model, task, images, None, settings, teacher=teacher, seed=seed)
    return method.settle(view(model))


def _trained(model: nn.Module) -> set[str]:
    return {name.replace(".inner.", ".") for name, p in model.named_parameters() if p.requires_grad}


def _images(
    model: nn.Module,
    data: Any,
    image_size: tuple[int, int] | int | None,
    seed: int,
    share: float,
) -> tuple[Dataset[Any], bool]:
    """The images to train on, and whether they have labels."""
    if isinstance(data, Split):
        described = preprocessing.of_model(model, "", input_size(model, image_size)[1])
        part = limited(data.train, max(1, math.ceil(share * len(data.train))), seed)
        transform = preprocessing.training_transform(described, Augmentation())
        return ImageSet(part, transform, seed), True
    if not isinstance(data, Iterable):
        raise DataError(
            "Images are needed to train gates. Pass data: batches of images, (images, labels) "
            "pairs, or an opened split."
        )
    pairs = [(batch, None) if isinstance(batch, Tensor) else tuple(batch)[:2] for batch in data]
    if not pairs:
        raise DataError("The data gave no batch. One of images, or (images, labels), works.")
    pixels = torch.cat([given.detach().cpu() for given, _ in pairs])
    labels = [known for _, known in pairs if isinstance(known, Tensor)]
    complete = len(labels) == len(pairs)
    targets = (
        torch.cat([known.detach().cpu() for known in labels])
        if complete
        else torch.zeros(len(pixels), dtype=torch.long)
    )
    count = max(1, math.ceil(share * len(pixels)))
    drawn = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:count]
    return TensorSet(pixels[drawn], targets[drawn]), complete


def settle(
    model: nn.Module,
    *,
    target_flops: str | float | None = None,
    image_size: tuple[int, int] | int | None = None,
) -> CompressedModel:
    """What a trained method has learned, carried out: gates go, and so does what they closed.

    Args:
        model: a model that was wrapped with a method that is trained, after its training. It is not
            changed. Adapters are merged first.
        target_flops: remove as much as this needs (a ratio of the model's cost, or a figure such as
            ``1.8G``), least worthy first; None: what was learned to be worth nothing.
        image_size: for models that do not say theirs.

    Returns:
        A model whose plan says what was removed instead of what was trained.

    Raises:
        BadSetting: nothing in the model was put in to be trained so.
        BadBudget: the target cannot be read. BudgetUnreachable: it cannot be met.
        UnsupportedSite: what was learned cannot be folded into a layer.
    """
    whole = merge(model) if is_adapted(model) else copy.deepcopy(model)
    inner, history = unwrap(whole), History.of(whole)
    number, method = _trained_step(history)
    learned = None if method is None else method.settle(view(inner))
    if method is None or learned is None:
        raise BadSetting(
            "There is nothing to settle: the model was not wrapped with a method that is trained "
            "before it decides, or was settled already."
        )
    if target_flops is None:
        known = learned.get("strength") if isinstance(learned, Mapping) else None
        strength = method.strength if known is None else float(known)
        decisions = method.decide(view(inner), strength, Evidence(learned=learned))
    else:
        strength, decisions = _to_budget(inner, method, learned, target_flops, image_size)
    method.apply(view(inner), decisions)
    step = Step(history.plan.steps[number].method, method.settings(), strength, decisions)
    return CompressedModel(inner, _instead(history, number, step))


def _trained_step(history: History) -> tuple[int, Trained | None]:
    """The last step of a method that is trained."""
    for number, step in reversed(list(enumerate(history.plan.steps))):
        method = make(step.method, dict(step.settings))
        if isinstance(method, Trained) and step.decisions:
            return number, method
    return -1, None


def _instead(history: History, number: int, step: Step) -> History:
    """A history without a step, and with another at its end: it cuts what later steps had left."""
    steps = history.plan.steps
    left = replace(
        history,
        plan=Plan((*steps[:number], *steps[number + 1 :])),
        merged=history.merged - (number < history.merged),
    )
    return left.then(step)


def _to_budget(
    model: nn.Module,
    method: Trained,
    learned: Any,
    target: str | float,
    image_size: tuple[int, int] | int | None,
) -> tuple[float, Decisions]:
    budget = parse_one(target, None, None)
    pricing = Pricing(model, [method], budget.quantity, image_size, 1)
    limit = budget.limit(pricing.base_cost(measure(model, image_size)))
    evidence, backbone = Evidence(learned=learned), view(model)

    def decide(strength: float) -> list[Decisions]:
        return [method.decide(backbone, strength, evidence)]

    found = search(decide, pricing, limit)
    if not meets(found.cost, limit) and found.strength > 0:
        raise BudgetUnreachable(
            f"FLOPs of at most {limit / 1e9:.4f} G were asked (target {budget.asked}); the nearest "
            f"below is {found.cost / 1e9:.4f} G and the smallest reachable "
            f"{found.smallest / 1e9:.4f} G."
        )
    return found.strength, found.decisions[0]
