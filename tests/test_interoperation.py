"""What others' tools make of a wrapped model and of a saved folder."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch

import peft_vision as pv
from tests.families import CLASSES, FAMILIES, build, features, images, moved, run

BYPASSED = ("timm_eva02_small", "timm_eva02_small_class", "timm_eva_dinov3_qkv_bias")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_plain_peft_gives_the_same_output_or_fails_with_a_sentence(
    family: str, tmp_path: Path
) -> None:
    dense = build(family)
    x = images(dense)
    ours = moved(pv.wrap(copy.deepcopy(dense), "lora"))
    ours.save_pretrained(tmp_path / "out")
    if family in BYPASSED:
        with pytest.raises(KeyError, match=r"open this folder with peft_vision\.load .*linears"):
            peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "out")
        return
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "out")
    assert (run(theirs, x) - run(ours, x)).abs().max() < 1e-5


@pytest.mark.parametrize("family", BYPASSED)
def test_a_merged_checkpoint_loads_where_the_adapter_cannot(family: str) -> None:
    dense = build(family)
    x = images(dense)
    ours = moved(pv.wrap(copy.deepcopy(dense), "lora", split_qkv=True))
    merged = pv.merge(ours)
    dense.load_state_dict(merged.state_dict(), strict=True)
    assert (run(dense, x) - run(ours, x)).abs().max() < 1e-5


def test_a_trainer_of_transformers_trains_and_resumes(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    rows = {"pixel_values": torch.randn(8, 3, 32, 32).tolist(), "labels": [i % 5 for i in range(8)]}
    data = Dataset.from_dict(rows).with_format("torch")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"],
    )
    dense = build("hf_vit")
    model = pv.wrap(copy.deepcopy(dense), "lora")
    Trainer(model=model, args=arguments, train_dataset=data).train()
    again = pv.wrap(copy.deepcopy(dense), "lora")
    arguments.max_steps = 4
    Trainer(model=again, args=arguments, train_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    x = images()
    assert (run(again, x) - run(model, x)).abs().max() < 1e-5
    assert (run(model, x) - run(dense, x)).abs().max() > 1e-3
    reloaded = pv.load(tmp_path / "checkpoint-4", base=dense)
    assert (run(reloaded, x) - run(model, x)).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
def test_compiled_models_compute_and_learn_the_same(family: str) -> None:
    plain = moved(pv.wrap(build(family), "lora")).train()
    twin = copy.deepcopy(plain)
    x = images(plain)
    compiled = torch.compile(twin, backend="aot_eager")
    for model in (plain, compiled):
        features(model(x)).square().sum().backward()
    assert (features(compiled(x)) - features(plain(x))).abs().max() < 1e-5
    pairs = zip(plain.named_parameters(), twin.named_parameters(), strict=True)
    for (name, ours), (_, theirs) in pairs:
        if ours.requires_grad:
            assert ours.grad is not None, name
            assert theirs.grad is not None, name
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5), name


def test_the_parts_of_timm_s_training_script_take_the_model(tmp_path: Path) -> None:
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV3, unwrap_model

    model = pv.wrap(build("timm_vit"), "lora").train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2)
    average = ModelEmaV3(model, decay=0.5)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES)
    x, labels, losses = images(batch=4), torch.arange(4) % CLASSES, []
    for step in range(6):
        mixed, soft = mixup(x.clone(), labels)
        loss = SoftTargetCrossEntropy()(model(mixed), soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=step)
        scheduler.step_update(step)
        losses.append(loss.item())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert unwrap_model(average) is not model
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    state = torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict"]
    again = pv.wrap(build("timm_vit"), "lora")
    again.load_state_dict(state)
    assert torch.equal(run(again, x), run(model, x))
