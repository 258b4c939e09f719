"""Every error raised on purpose.

A message says what was asked, what was found and what would have worked. `exit_code` is what the
command line returns: 2 for bad arguments or bad input, 1 for a job that failed.
"""

from __future__ import annotations


class PeftVisionError(Exception):
    """Base class of all errors that peft_vision raises on purpose."""

    exit_code: int = 2


class UnknownName(PeftVisionError):
    """A method, model, recipe or setting that does not exist; the message offers the nearest."""


class BadSetting(PeftVisionError):
    """A setting outside its range."""


class UnsupportedBackbone(PeftVisionError):
    """An architecture that is not understood, with what is missing."""


class UnsupportedSite(PeftVisionError):
    """A method was asked to act on a place, or a layer, that it has no rule for."""


class GradientMissing(PeftVisionError):
    """Adapters that would not train, proven by a forward and backward pass."""


class GradientUnproven(GradientMissing):
    """Whether adapters train could not be shown: the model cannot be run on what was given."""


class BadBudget(PeftVisionError):
    """A budget that cannot be read."""


class BudgetUnreachable(PeftVisionError):
    """No plan of the methods given meets the budget; the message names the smallest figure."""


class DataError(PeftVisionError):
    """A data folder or data set that cannot be trained or evaluated on."""


class RecipeError(PeftVisionError):
    """A recipe with a mistake, with the line and the nearest key."""


class ArtifactError(PeftVisionError):
    """A saved folder that cannot be read."""


class NewerSchema(ArtifactError):
    """A folder written by a newer peft_vision."""


class WrongBase(ArtifactError):
    """The base model is not the one that the artifact was made from."""


class DamagedArtifact(ArtifactError):
    """A file of the artifact is missing, truncated or altered."""


class OutputExists(PeftVisionError):
    """The output folder is there already."""


class MissingExtra(PeftVisionError):
    """An optional dependency is needed; the message names the extra that installs it."""


class CannotWrite(PeftVisionError):
    """Writing failed (disk full, no permission); what was there before is intact."""

    exit_code = 1


class ExportMismatch(PeftVisionError):
    """The exported model does not compute what the live model computes."""

    exit_code = 1


class UploadFailed(PeftVisionError):
    """The Hub refused or the connection broke; the local folder is intact."""

    exit_code = 1


class JobFailed(PeftVisionError):
    """A run that could not be finished for a reason that is not the user's input."""

    exit_code = 1
