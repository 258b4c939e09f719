"""Carry out a recipe: data, model, methods, training, and the saved result."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_vision.errors import BadSetting, GradientMissing, UnsupportedSite
from peft_vision.finetuning.images import ImagesJob
from peft_vision.finetuning.job import Job, Say
from peft_vision.finetuning.pairs import PairsJob, is_tracking
from peft_vision.memory import settling
from peft_vision.memory.estimate import rehearsal_of
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.recipe import LoadedRecipe, Recipe, load_recipe
from peft_vision.training import identity
from peft_vision.training.fit import fit
from peft_vision.training.processes import joined
from peft_vision.training.run_folder import RunFolder, open_run


@dataclass(frozen=True)
class Finetuned:
    """What came of a run.

    Attributes:
        model: the wrapped model in evaluation mode.
        metrics: validation figures; accuracies are fractions in [0, 1].
        output: the folder it was saved in.
        resumed: the step that an earlier run had reached, or None.
    """

    model: Any
    metrics: dict[str, float]
    output: Path
    resumed: int | None


def finetune(
    recipe: Recipe | LoadedRecipe | str | Path,
    words: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    force: bool = False,
    say: Say | None = None,
) -> Finetuned:
    """Fine-tune as a recipe says and save the result.

    A run that was killed goes on from its newest complete checkpoint when it is called again with
    the same recipe and output, and ends with the same weights. Under `accelerate launch` every
    process calls this function; the main one saves.

    Where it is to run on a CUDA GPU, or the recipe has `memory`, one step is rehearsed without
    numbers first, and a run that cannot fit is refused before anything is downloaded.

    Args:
        recipe: a recipe, a YAML file, or the name of one that ships.
        words: `train.epochs=2` and the like, where `recipe` is a file or name.
        output: in place of the recipe's.
        overwrite: replace a finished result, or an unfinished run of another recipe.
        resume: False starts an unfinished run anew.
        force: train even if the memory is predicted not to be enough.
        say: is told, in one line each, what the user should know; by default it is logged.

    Raises:
        RecipeError: a mistake in the recipe.
        DataError: the data cannot be trained on.
        OutputExists: the output folder is in the way.
        UnknownName, BadSetting, UnsupportedSite, GradientMissing: model or method does not fit.
        BadSetting: the memory is not enough.
        CannotWrite: the result cannot be written.
    """
    plan = _recipe_of(recipe, words, output)
    say = say or logging.getLogger("peft_vision").info
    state = joined(plan.train.device)
    say = say if state.is_main_process else _silent
    folder = Path(plan.output).expanduser()
    wanted = identity.of_settings(plan.model_dump())
    run = open_run(folder, wanted, overwrite=overwrite, resume=resume)
    fitting = _Fitting(plan, run, force, say, state.num_processes)
    chosen = fitting.before_anything()
    job = _opened(plan, say)
    wanted |= job.identity()
    run = open_run(folder, wanted, overwrite=overwrite, resume=resume)
    model = job.build()
    if chosen is None:
        chosen = fitting.settled(job.rehearsal(model, state.num_processes))
    plan = plan.model_copy(update={"train": plan.train.model_copy(update=chosen)})
    state.wait_for_everyone()
    if state.is_main_process:
        run.begin(wanted)
        if plan.memory is not None:
            settling.record(run.run_dir, chosen)
    state.wait_for_everyone()
    if state.num_processes > 1:
        say(f"Training with {state.num_processes} processes ({state.backend}).")
    if run.resumed is not None:
        say(f"Resuming the unfinished run in {folder} from step {run.resumed}.")
    metrics = _fit(model, job, plan, run)
    model.history.metrics = job.records(metrics)
    if state.is_main_process:
        _save(model, run, plan)
    state.wait_for_everyone()
    return Finetuned(model, metrics, folder, run.resumed)


@dataclass(frozen=True)
class _Fitting:
    """Chooses the settings with which a run fits, once: a resumed run goes on with the same."""

    recipe: Recipe
    run: RunFolder
    force: bool
    say: Say
    processes: int

    def before_anything(self) -> dict[str, Any] | None:
        """Settings of `train` by their names; None where the wrapped model is needed."""
        if not settling.is_asked(self.recipe, self.processes):
            return {}
        found = settling.recorded(self.run.run_dir) if self.run.resumed is not None else None
        if found is not None:
            return found
        try:
            rehearsal = rehearsal_of(self.recipe, processes=self.processes)
        except (BadSetting, UnsupportedSite, GradientMissing):
            return None  # it needs numbers; or else it is the same when the model is built
        return self.settled(rehearsal)

    def settled(self, rehearsal: Rehearsal) -> dict[str, Any]:
        """What is chosen for the recipe's memory, or the GPU that is there."""
        return settling.settle(self.recipe, rehearsal, force=self.force, say=self.say)


def _recipe_of(
    recipe: Recipe | LoadedRecipe | str | Path, words: Sequence[str], output: str | Path | None
) -> Recipe:
    if isinstance(recipe, (str, Path)):
        flags = {} if output is None else {"output": str(output)}
        return load_recipe(recipe, words, flags).recipe
    found = recipe.recipe if isinstance(recipe, LoadedRecipe) else recipe
    if words:
        raise BadSetting(
            "key=value words go with a recipe file or name. A Recipe object is changed with "
            "recipe.model_copy(update=...)."
        )
    return found if output is None else found.model_copy(update={"output": str(output)})


def _opened(recipe: Recipe, say: Say) -> Job:
    with joined(recipe.train.device).main_process_first():
        job: Job = PairsJob(recipe) if is_tracking(recipe) else ImagesJob(recipe)
    for note in job.notes:
        say(note)
    return job


def _fit(model: Any, job: Job, recipe: Recipe, run: RunFolder) -> dict[str, float]:
    learning = job.learning(model)
    return fit(
        learning.model,
        learning.task,
        learning.train,
        learning.validation,
        recipe.train,
        teacher=learning.teacher,
        run_dir=run.run_dir,
        log_dir=run.log_dir,
        seed=recipe.seed,
    )


def _save(model: Any, run: RunFolder, recipe: Recipe) -> None:
    import shutil

    import yaml

    stage = run.run_dir / "result"
    shutil.rmtree(stage, ignore_errors=True)
    model.save_pretrained(stage)
    (stage / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    run.finish(stage)


def _silent(_: str) -> None:
    """What processes other than the main one say."""
