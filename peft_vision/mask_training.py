"""Training what a method fills in before it decides, and settling it.

`prepare` trains for `compress`; `settle` is for a model that its user wrapped and trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from peft_vision.backbones import view
from peft_vision.backbones.sites import device_of
from peft_vision.budget import parse_one
from peft_vision.choosing import Chosen
from peft_vision.compressed import CompressedModel
from peft_vision.cost import input_size, measure, unwrap
from peft_vision.data import preprocessing
from peft_vision.data.material import Material, Wanted, opened
from peft_vision.errors import BadSetting, BudgetUnreachable
from peft_vision.history import History
from peft_vision.layers.gate_control import controller_in
from peft_vision.merging import merge
from peft_vision.method import Evidence, Trained, make, name_of
from peft_vision.plan import Decisions, Plan, Step
from peft_vision.pricing import Pricing
from peft_vision.search import meets, search
from peft_vision.tasks.imitation import Imitation
from peft_vision.training.fit import fit
from peft_vision.training.settings import TrainSettings
from peft_vision.wrapping import is_adapted

STEPS = 400
"""Of a method that does not say how many it plans with."""


def prepare_all(
    model: nn.Module,
    chosen: Chosen,
    data: Any,
    target: float,
    *,
    image_size: tuple[int, int] | int | None,
    history: History,
) -> None:
    """Have every method trained that is to be, in place; what it learned is in its evidence then.

    Args:
        target: share of the model's cost that is to be left by all methods together, in (0, 1].

    Raises:
        BadSetting: no images were given. The rest: see `prepare`.
    """
    for place in chosen.spending:
        method = chosen.methods[place]
        if not isinstance(method, Trained):
            continue
        if data is None:
            raise BadSetting(
                f"{name_of(method)} is trained before it decides, and no images were given: pass "
                "data=, a folder or batches."
            )
        share = target ** (1 / len(chosen.spending))
        learned = prepare(model, method, data, share, image_size=image_size, history=history)
        chosen.evidence[place] = replace(chosen.evidence[place], learned=learned, memory={})
        chosen.notes.extend(learned.get("notes", ()) if isinstance(learned, dict) else ())


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
    history: History | None = None,
) -> Any:
    """Have a method trained on a model, in place, and settle it.

    Args:
        model: a plain model; it is left in evaluation mode, settled, with all of its units.
        method: what is attached and trained, distilled from the model as it is now.
        data: a folder of images, or another source as in a recipe; or images that are open already:
            a split, batches of images B 3 H W, or (images, labels) pairs. Without labels the model
            is distilled alone.
        target: share of the multiply-accumulates that is to be left, in (0, 1].
        epochs: over the images that the method uses; None: as many as make the steps that the
            method plans with.
        learning_rate: of what the method put in, which it says how much faster learns. Weights, if
            they are trained, have the method's own `weight_rate`, or else this one, too.
        image_size: for models that do not say theirs.
        history: of the model: how it wants its images prepared, and the names of its classes.

    Returns:
        What was learned, for `Evidence.learned`.

    Raises:
        DataError: there are no images. UnsupportedSite: the method cannot act on this model.
    """
    teacher, device = copy.deepcopy(model).eval(), device_of(model)
    steps = getattr(method, "steps", STEPS)
    material = _material(model, method, data, (steps * batch_size, seed), image_size, history)
    method.attach(view(model), target)
    control = controller_in(model)
    each = math.ceil(len(material) / batch_size)
    rounds = math.ceil(steps / each) if epochs is None else epochs
    trains_weights = control is None or bool(set(control.thawed) & _trained(model))
    slow = getattr(method, "weight_rate", learning_rate) if trains_weights else learning_rate
    if control is not None:
        control.plan(rounds * each)
        control.hasten(learning_rate / slow)
    task = Imitation(
        weight=0.5 if material.labeled and trains_weights else 1.0,
        classifies=bool(view(model).classifier),
    )
    settings = TrainSettings(
        epochs=rounds,
        batch_size=min(batch_size, len(material)),
        learning_rate=slow,
        weight_decay=0.0,
        warmup=0.0,
        loggers=[],
        progress=False,
    )
    fit(model, task, material.images, None, settings, teacher=teacher, seed=seed)
    learned = method.settle(view(model.to(device)))
    if isinstance(learned, dict):
        learned["notes"] = [*material.notes, *learned.get("notes", ())]
    return learned


def _material(
    model: nn.Module,
    method: Trained,
    data: Any,
    planned: tuple[int, int],
    image_size: tuple[int, int] | int | None,
    history: History | None,
) -> Material:
    """What a method is trained on; `planned`: how many images its steps take, and the seed."""
    known = history or History()
    share, side = getattr(method, "data_share", 1.0), input_size(model, image_size)[1]
    described = known.preprocessing or preprocessing.of_model(model, "", side)
    return opened(data, Wanted(share, *planned, _classes(model, known)), described)


def _trained(model: nn.Module) -> set[str]:
    return {name.replace(".inner.", ".") for name, p in model.named_parameters() if p.requires_grad}


def _classes(model: nn.Module, history: History) -> list[str] | int:
    """Names of the model's classes, or only how many there are."""
    last = [site.layer for site in view(model).classifier]
    outputs = int(getattr(last[-1], "out_features", 0)) if last else 0
    known = history.labels
    return known if known is not None and len(known) == outputs else outputs


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
