"""How to train: the `train` section of a recipe, and the argument of `fit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from peft_vision.errors import BadSetting
from peft_vision.training.processes import on_accelerator

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import TrainingArguments

Positive = Annotated[int, Field(ge=1)]
Optimizer = Literal[
    "adamw",
    "sgd",
    "adafactor",
    "adamw_8bit",
    "paged_adamw_8bit",
    "loraplus",
    "lorafa",
    "riemannian",
]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
Logger = Literal["tensorboard", "trackio", "wandb"]


class TrainSettings(BaseModel):
    """Settings of one training run; every field has a range and a default.

    Attributes:
        batch_size: images per optimizer step over *all* processes; "auto": the largest power of two
            that fits the recipe's `memory`.
        micro_batch: the most images one process holds at a time; smaller than its share of
            `batch_size` means gradient accumulation. None: no accumulation; "auto": the largest
            divisor of the share that fits the recipe's `memory`.
        optimizer: the last three are PEFT's, for low-rank updates.
        learning_rate_ratio: with loraplus, how many times faster the second matrix of an update
            learns than the first (16 in the paper).
        warmup: fraction of all steps during which the learning rate rises from 0.
        save_every, evaluate_every: in optimizer steps; None: once an epoch.
        keep_checkpoints: how many complete checkpoints stay on disk while the run goes on.
        frozen: how weights that are not trained are stored while training: as they are, or rounded
            to bf16. Packed ones (4 or 8 bits) stay as they are.
        norms: "low" keeps what a frozen norm gave, in low precision, for the backward pass, and not
            its input in full; gradients are rounded, outputs are not.
        recompute: "activations" computes GELU, SiLU and gates again in the backward pass, to the
            bit, instead of keeping them.
        gradient_checkpointing: recompute whole blocks in the backward pass: true for every block,
            or how many, spread evenly over those whose gradient is needed.
        drop_path: share of the samples that a branch of a block leaves out, in [0, 1). It is
            computed for the others only (stochastic depth).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    epochs: Positive = 10
    max_steps: Positive | None = None
    batch_size: Positive | Literal["auto"] = 64
    micro_batch: Positive | Literal["auto"] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 5e-4
    optimizer: Optimizer = "adamw"
    learning_rate_ratio: Annotated[float, Field(ge=1, le=1000)] = 16.0
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.05
    schedule: Schedule = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip_gradient: Annotated[float, Field(ge=0)] = 1.0
    precision: Precision = "auto"
    frozen: Literal["keep", "bf16"] = "keep"
    norms: Literal["full", "low"] = "full"
    recompute: Literal["nothing", "activations"] = "activations"
    gradient_checkpointing: bool | Annotated[int, Field(ge=0)] = False
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    save_every: Positive | None = None
    evaluate_every: Positive | None = None
    keep_checkpoints: Positive = 2
    loggers: list[Logger] = ["tensorboard"]
    progress: bool = True
    device: Literal["auto", "cpu"] = "auto"


def share_of(settings: TrainSettings, processes: int) -> tuple[int, int]:
    """Images per process and pass, and passes per optimizer step, for a global batch.

    Raises:
        BadSetting: the global batch cannot be divided evenly, or nobody has said how large it is.
    """
    for name in ("batch_size", "micro_batch"):
        if getattr(settings, name) == "auto":
            raise BadSetting(
                f"train.{name}=auto is chosen for the recipe's `memory`, and there is none here. A "
                "number works, and so does a recipe with a line such as memory: 24GB."
            )
    batch_size, wanted = settings.batch_size, settings.micro_batch
    if isinstance(batch_size, str) or isinstance(wanted, str):
        raise TypeError("auto is refused above")
    share, rest = divmod(batch_size, processes)
    if rest:
        raise BadSetting(
            f"train.batch_size={batch_size} is the global batch and cannot be divided "
            f"over {processes} processes. A multiple of {processes} works, such as "
            f"{max(1, round(batch_size / processes)) * processes}."
        )
    micro = min(wanted or share, share)
    passes, rest = divmod(share, micro)
    if rest:
        divisors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise BadSetting(
            f"train.micro_batch={micro} does not divide the {share} images that each of "
            f"{processes} process(es) takes of train.batch_size={batch_size}. "
            f"These do: {divisors}."
        )
    return micro, passes


def uses_bf16(settings: TrainSettings) -> bool:
    """Whether to compute in bfloat16: on request, or with `auto` where a GPU has it.

    Raises:
        BadSetting: bfloat16 was asked for on a GPU that lacks it.
    """
    import torch

    on_gpu = torch.cuda.is_available() and on_accelerator(settings.device)
    has_it = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.precision == "bf16" and on_gpu and not has_it:
        raise BadSetting(
            f"train.precision=bf16, but {torch.cuda.get_device_name()} has no bfloat16. "
            "auto or fp32 work there."
        )
    return settings.precision == "bf16" or (settings.precision == "auto" and has_it)


def require_bf16(settings: TrainSettings, *, possible: bool) -> None:
    """Refuse to round weights where products would not round them anyway.

    Args:
        possible: whether the run computes, or may compute, in bfloat16.

    Raises:
        BadSetting: frozen weights are to be stored in bfloat16, and it does not.
    """
    if settings.frozen == "bf16" and not possible:
        raise BadSetting(
            f"train.frozen=bf16 stores weights as products in bf16 round them, and with "
            f"train.precision={settings.precision} this run computes in fp32 here. "
            "train.precision=bf16 or train.frozen=keep works."
        )


def training_arguments(
    settings: TrainSettings, run_dir: Path, processes: int, seed: int
) -> TrainingArguments:
    """The `transformers.TrainingArguments` that say the same as `settings`."""
    import torch
    from transformers import TrainingArguments

    require_bf16(settings, possible=uses_bf16(settings))
    micro, passes = share_of(settings, processes)
    accelerated = on_accelerator(settings.device)
    on_gpu = accelerated and torch.cuda.is_available()
    plain = "adamw_torch_fused" if on_gpu else "adamw_torch"
    names = {
        "adamw": plain,
        "adamw_8bit": "adamw_bnb_8bit",
        **dict.fromkeys(("loraplus", "lorafa", "riemannian"), plain),  # made from the model instead
    }
    others: list[str] = [name for name in settings.loggers if name != "tensorboard"]
    return TrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=passes,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        optim=names.get(settings.optimizer, settings.optimizer),
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.clip_gradient,
        bf16=uses_bf16(settings),
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=on_gpu,
        logging_strategy="steps",
        logging_steps=1,
        eval_strategy="no",
        save_strategy="steps" if settings.save_every else "epoch",
        save_steps=settings.save_every or 500,
        report_to=others or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        use_cpu=not accelerated,
        seed=seed,
        logging_nan_inf_filter=False,
    )
