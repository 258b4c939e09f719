"""`compress`: a smaller model that meets a stated budget, proven by counting it again."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_vision.applying import apply_all
from peft_vision.backbones import view
from peft_vision.backbones.sites import device_of
from peft_vision.budget import Budget, Quantity, parse_one
from peft_vision.choosing import DEFAULT, MORE, Chosen, choose
from peft_vision.compensation import Compensation, apply_compensated
from peft_vision.compressed import CompressedModel
from peft_vision.cost import Cost, input_size, measure, unwrap
from peft_vision.data import preprocessing
from peft_vision.data.image_set import batches_of
from peft_vision.data.source import open_for_calibration
from peft_vision.errors import (
    BadSetting,
    BudgetUnreachable,
    UnsupportedBackbone,
    UnsupportedSite,
)
from peft_vision.history import History, fingerprint
from peft_vision.importance import as_evidence
from peft_vision.layers.showing import images_of
from peft_vision.mask_training import prepare_all
from peft_vision.merging import merge
from peft_vision.method import Evidence, Method, Stage, Trained, name_of
from peft_vision.mixing import Mix, best_mix, divergence
from peft_vision.plan import Decisions, Step
from peft_vision.pricing import Pricing
from peft_vision.result import Result, kinds_of
from peft_vision.search import Found, meets, search
from peft_vision.tasks.classification import logits_of
from peft_vision.wrapping import is_adapted


def compress(
    model: nn.Module,
    *,
    target_flops: str | float | None = None,
    target_params: str | float | None = None,
    target_latency_ms: str | float | None = None,
    methods: str | Method | Sequence[str | Method] | None = None,
    data: Any = None,
    compensate: str = "ridge",
    trials: int = 6,
    image_size: tuple[int, int] | int | None = None,
    batch_size: int = 1,
) -> Result:
    """Make a model physically smaller and faster, to a budget.

    Args:
        model: a backbone, wrapped or plain; adapters are merged first. It is not changed.
        target_flops: at most this: a ratio in (0, 1], or FLOPs such as ``1.8G`` or ``0.9GMACs``.
        target_params: a ratio or a count such as ``9M``.
        target_latency_ms: milliseconds per batch of `batch_size`, on the device the model is on.
        methods: names, presets or Method objects; by default the preset "balanced", and with it
            "factors" where the first cannot act or does not reach the budget, which a note then
            says. Methods that cost no accuracy (preset "exact") are applied first in any case.
        data: what methods decide by, and what the layers that are left are fitted again on: a
            folder of images (512 are drawn, more to train what is trained; labels are optional), or
            batches of images B 3 H W or of (images, labels).
        compensate: with data, how what stays takes over what went: "ridge", "mean" or "none".
        trials: with data and several methods, how many divisions of the budget among them are
            tried; 1 gives each the same strength.
        image_size: for models that do not say theirs.

    Returns:
        A model in (0.98, 1.00] of the budget.

    Raises:
        BadBudget: the budget cannot be read, or not exactly one was given.
        BudgetUnreachable: no plan of these methods lies in the band; with the nearest figures.
        UnsupportedSite: a method named cannot act on this backbone.
        BadSetting: `compensate` or `trials` is out of range, or the data hold no images.
    """
    start = time.perf_counter()
    asked = _Asked(
        model,
        parse_one(target_flops, target_params, target_latency_ms),
        data,
        Compensation(compensate),  # type: ignore[arg-type]
        trials,
        image_size,
        batch_size,
    )
    if trials < 1:
        raise BadSetting(f"trials is {trials}; 1 or more works.")
    result = _by_default(asked) if methods is None else _compressed(asked, methods)
    result.seconds = time.perf_counter() - start
    return result


@dataclass(frozen=True)
class _Asked:
    model: nn.Module
    budget: Budget
    data: Any
    how: Compensation
    trials: int
    image_size: tuple[int, int] | int | None
    batch_size: int


def _by_default(asked: _Asked) -> Result:
    """By the default preset, and where it fails with more methods."""
    try:
        return _compressed(asked, DEFAULT, explicit=False)
    except (UnsupportedSite, BudgetUnreachable) as reason:
        try:
            result = _compressed(asked, (DEFAULT, MORE), explicit=False)
        except (UnsupportedSite, BudgetUnreachable):
            raise reason from None
        result.notes.insert(0, f"{MORE} were used, too, because without: {reason}")
        return result


def _compressed(
    asked: _Asked, methods: str | Method | Sequence[str | Method], *, explicit: bool = True
) -> Result:
    budget, size = asked.budget, asked.image_size
    base, history = _without_adapters(asked.model)
    batches = None if asked.data is None else _held(asked.data, base, history)
    evidence = Evidence(batches, heads=as_evidence, fits=asked.how.how != "none")
    chosen = choose(base, methods, budget.quantity, evidence, explicit=explicit)
    before = measure(base, size)
    history.before = history.before or before.to_json()
    history.fingerprint = history.fingerprint or fingerprint(base)
    pricing = Pricing(base, chosen.methods, budget.quantity, size, asked.batch_size)
    job = _Job(base, chosen, pricing, budget, before, batches, asked.how)
    job, history = _with_training(job, asked.data, history, size)
    training = base.training
    try:
        job.base.eval()
        built = _spend(job, asked.trials)
    finally:
        base.train(training)
    built.model.train(training)
    history = history.then(*built.steps)
    return Result(
        model=CompressedModel(built.model, history),
        before=before,
        cost=built.cost,
        budget=budget,
        limit=job.limit,
        got=built.got,
        plan=history.plan,
        seconds=0.0,
        tried=built.found.tried,
        notes=chosen.notes,
        kinds=kinds_of(base),
    )


def _with_training(
    job: _Job, data: Any, history: History, image_size: tuple[int, int] | int | None
) -> tuple[_Job, History]:
    """The job on a copy with what methods learned folded into it; they have the rest as evidence.

    Exact steps that are not enough are done in the copy first: methods learn to save the rest.
    """
    if not any(isinstance(method, Trained) for method in job.chosen.methods):
        return job, history
    base, methods = copy.deepcopy(job.base), job.chosen.methods
    exact = [
        method.decide(view(base), 1.0, evidence) if method.stage == Stage.EXACT else {}
        for method, evidence in zip(methods, job.chosen.evidence, strict=True)
    ]
    cost = job.pricing(exact)
    if any(exact) and cost > job.limit:
        history = history.then(*_steps(methods, 1.0, apply_all(base, methods, exact)))
        job = job.without_exact()
    elif any(exact):
        cost = job.pricing([{} for _ in methods])
    source = data if isinstance(data, str | Path) else job.batches
    share = min(1.0, job.limit / cost)
    prepare_all(base, job.chosen, source, share, image_size=image_size, history=history)
    own = (job.pricing.quantity, image_size, job.pricing.batch_size)
    pricing = Pricing(base, job.chosen.methods, *own)
    return replace(job, base=base, pricing=pricing), history


def _held(data: Any, base: nn.Module, history: History) -> list[Any]:
    """The batches in memory: they are gone through several times."""
    if isinstance(data, str | Path):
        described = history.preprocessing or preprocessing.of_model(base, "", input_size(base)[1])
        transform = preprocessing.evaluation_transform(described)
        images = open_for_calibration(str(data), CALIBRATION)
        return [pixels for pixels, _ in batches_of(images, transform, CALIBRATION)]
    batches = list(data)
    if not batches:
        raise BadSetting("The data gave no batch. An iterable of (images, labels) works.")
    for batch in batches:
        images_of(batch)
    return batches


@dataclass(frozen=True)
class _Built:
    job: _Job
    model: nn.Module
    steps: list[Step]
    found: Found
    cost: Cost
    got: float


@dataclass(frozen=True)
class _Job:
    """What is asked of the search."""

    base: nn.Module
    chosen: Chosen
    pricing: Pricing
    budget: Budget
    before: Cost
    batches: list[Any] | None
    how: Compensation

    @property
    def base_cost(self) -> float:
        return self.pricing.base_cost(self.before)

    @property
    def limit(self) -> float:
        return self.budget.limit(self.base_cost)

    @property
    def timed(self) -> bool:
        return self.budget.quantity == "latency_ms"

    def mixed(self, mix: Mix) -> _Job:
        return replace(self, chosen=self.chosen.mixed(mix))

    def without_exact(self) -> _Job:
        chosen = self.chosen.without_exact()
        return replace(self, chosen=chosen, pricing=self.pricing.of(chosen.methods))


def _spend(job: _Job, trials: int) -> _Built:
    """Divide the budget among the methods by trial where there are images to try on."""
    count = len(job.chosen.spending)
    if count < 2 or trials < 2 or job.batches is None or job.timed:
        return _find(job)
    fitted, held_out = _parted(job.batches, device_of(job.base))
    try:
        with torch.no_grad():
            wanted = [logits_of(job.base(x)).detach() for x in held_out]
    except UnsupportedBackbone:  # no classifier whose answers could be compared
        return _find(job)

    def attempt(mix: Mix) -> tuple[float, _Built | None]:
        try:
            built = _find(replace(job.mixed(mix), batches=fitted))
        except BudgetUnreachable:
            return float("inf"), None
        return divergence(built.model.eval(), wanted, held_out), built

    mix, best = best_mix(count, attempt, trials)
    if best is None:
        return _find(job)
    job.chosen.notes.append(_said(job.chosen, mix))
    return _build(replace(best.job, batches=job.batches), best.found)


def _said(chosen: Chosen, mix: Mix) -> str:
    shares = [
        f"{name_of(chosen.methods[i])} {w:g}" for i, w in zip(chosen.spending, mix, strict=True)
    ]
    return (
        f"The budget was divided by trial on the images; relative strengths: {', '.join(shares)}."
    )


def _parted(batches: list[Any], device: torch.device) -> tuple[list[Any], list[Tensor]]:
    """Some of the images to fit a trial on, and as many others to compare its answers on."""
    images = torch.cat([images_of(batch).to(device) for batch in batches])
    size = max(len(images_of(batch)) for batch in batches)
    share = max(1, min(TRIAL, len(images) // 2))
    held_out = images[:share] if len(images) == 1 else images[share : 2 * share]
    return list(torch.split(images[:share], size)), list(torch.split(held_out, size))


ATTEMPTS, CALIBRATION, TRIAL = 4, 512, 256


def _find(job: _Job) -> _Built:
    """Search, build, and take the cost again on what was built.

    A counted cost is right at once. A timed one is aimed again by what the second timing said.
    """
    limit = aim = job.limit
    tried = 0
    for _ in range(ATTEMPTS if job.timed else 1):
        found = search(_decider(job), job.pricing, aim, exact=not job.timed)
        tried += found.tried
        if _overshot(job, found, limit):
            return _find(job.without_exact())
        _require(found, job, limit)
        built = _build(job, replace(found, tried=tried))
        if meets(built.got, limit):
            return built
        aim *= 0.99 * limit / built.got
    spoken = _message(job, limit, replace(found, cost=built.got))
    raise BudgetUnreachable(spoken)


def _overshot(job: _Job, found: Found, limit: float) -> bool:
    """Whether the exact steps, which are taken whole, have brought the cost below the band."""
    has_exact = len(job.chosen.spending) < len(job.chosen.methods)
    reachable = found.smallest <= limit and found.strength > 0
    return has_exact and reachable and not job.timed and not meets(found.cost, limit)


def _build(job: _Job, found: Found) -> _Built:
    smaller = copy.deepcopy(job.base).eval()
    methods = job.chosen.methods
    with torch.no_grad():
        if job.batches is None:
            done = apply_all(smaller, methods, found.decisions)
        else:
            done = apply_compensated(smaller, methods, found.decisions, job.batches, job.how)
    steps = _steps(methods, found.strength, done)
    cost = measure(smaller, job.pricing.size[1:])
    return _Built(job, smaller, steps, found, cost, job.pricing.again(smaller, cost))


def _steps(methods: list[Method], strength: float, done: list[Decisions]) -> list[Step]:
    """What a plan says of decisions that were carried out."""
    return [
        Step(name_of(method), method.settings(), strength, decisions)
        for method, decisions in zip(methods, done, strict=True)
        if decisions
    ]


def _decider(job: _Job) -> Any:
    backbone = view(job.base)

    def decide(strength: float) -> list[Decisions]:
        with torch.no_grad():
            return job.chosen.decide(backbone, strength)

    return decide


def _without_adapters(model: nn.Module) -> tuple[nn.Module, History]:
    """The plain model with adapters folded in, and what was done to it besides."""
    history = History.of(model)
    if not is_adapted(model):
        return unwrap(model), history
    merged = merge(model)
    own = getattr(merged, "history", None)
    return unwrap(merged), own if isinstance(own, History) else history.without_adapters()


def _require(found: Found, job: _Job, limit: float) -> None:
    if job.timed and found.cost <= limit and found.strength > 0:
        return
    if not meets(found.cost, limit) and not (found.strength == 0.0 and job.budget.relative):
        raise BudgetUnreachable(_message(job, limit, found))


def _message(job: _Job, limit: float, found: Found) -> str:
    names = ", ".join(name_of(method) for method in job.chosen.methods)
    say = _speaker(job.budget.quantity, job.base_cost)
    asked = f"{job.budget.quantity} of at most {say(limit)} was asked (target {job.budget.asked})"
    if found.smallest > limit:
        return (
            f"{asked}; the smallest that {names} can reach on this model is {say(found.smallest)}."
        )
    if found.strength == 0.0:
        return f"{asked}; the model meets it as it is, at {say(found.cost)}. Nothing was removed."
    return (
        f"{asked}; with {names} the nearest below is {say(found.cost)}, which is under 98 % of it: "
        f"the steps are too coarse. Add a method that acts on finer sites; the smallest reachable "
        f"is {say(found.smallest)}."
    )


def _speaker(quantity: Quantity, base: float) -> Any:
    def say(value: float) -> str:
        if quantity == "latency_ms":
            return f"{value:.3f} ms"
        if quantity == "params":
            return f"{value / 1e6:.4f} M ({value / base:.4f} of the model)"
        return f"{value / 2e9:.4f} GMACs ({value / base:.4f} of the model)"

    return say
