"""What becomes of tokens on their way through a trunk, and what composes with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.errors import UnsupportedSite
from peft_vision.exporting import export
from peft_vision.layers.attention import Attended
from peft_vision.layers.reduction import Reducer, Reduction, behind, take
from peft_vision.layers.trunk import Stream, Trunk, take_positions
from tests.families import (
    PATCHES,
    build,
    eva02_small,
    features,
    hf_dinov2_classifier,
    images,
    run,
    timm_vit,
)
from tests.test_exporting import run_onnx

F64 = torch.float64
DROP, MERGE = "token_reorganization", "token_merging"
WAYS = {
    "merged": [(MERGE, {"ratio": 0.2})],
    "protected": [(MERGE, {"ratio": 0.2, "protect": True})],
    "dropped": [(DROP, {"keep_rate": 0.6})],
    "merged, then dropped": [(MERGE, {"ratio": 0.1}), (DROP, {"keep_rate": 0.6})],
    "dropped, then merged": [(DROP, {"keep_rate": 0.6, "fuse": False}), (MERGE, {"ratio": 0.1})],
}
every_way = pytest.mark.parametrize("way", WAYS)


def reduced(model: nn.Module, way: str) -> nn.Module:
    for method, settings in WAYS[way]:
        model = pv.wrap(model, method, **settings)
    return unwrap(model).eval()


def trunk_of(model: nn.Module) -> Trunk:
    tokens = view(model).tokens
    assert tokens is not None
    return tokens.trunk()


def test_rows_are_taken_as_by_index() -> None:
    x, places = torch.randn(3, 7, 4), torch.stack([torch.randperm(5)[:3] for _ in range(3)])
    assert torch.equal(take(x, places), torch.stack([x[i, places[i]] for i in range(3)]))
    assert behind(places, 2)[:, :2].tolist() == [[0, 1]] * 3
    assert torch.equal(behind(places, 2)[:, 2:], places + 2)


def test_positions_are_taken_as_by_index() -> None:
    table, places = torch.randn(9, 6), torch.stack([torch.randperm(9)[:4] for _ in range(3)])
    cos, sin = take_positions((table, -table), places)
    for image in range(3):
        assert torch.equal(cos[image, 0], table[places[image]])
        assert torch.equal(sin[image, 0], -table[places[image]])
    again = torch.stack([torch.randperm(4)[:2] for _ in range(3)])
    twice = take_positions(cos, again)
    assert torch.equal(twice[1, 0], table[places[1]][again[1]])


class Followed:
    """What reducers were given and gave, and what left the trunk."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.stream: Stream | None = None
        self.out = torch.empty(0)
        for reducer in trunk.reducers.values():
            reducer.register_forward_hook(self.note)
        leave = trunk.leave

        def spied(stream: Stream) -> Tensor:
            self.stream, self.out = stream, leave(stream)
            return self.out

        trunk.leave = spied  # type: ignore[method-assign]

    def note(self, module: nn.Module, args: tuple[Tensor, ...], out: Reduction | None) -> None:
        if out is not None:
            self.steps.append((args[0], out.carriers))

    def slowly(self, image: int) -> Tensor:
        """Patch by patch: the state of the token that carries it, or its own when it left."""
        assert self.stream is not None
        states = []
        for patch in range(PATCHES):
            at, state = patch, None
            for x, carriers in self.steps:
                if state is None:
                    to = int(carriers[image, at])
                    state = x[image, self.trunk.prefix + at] if to < 0 else None
                    at = to
            states.append(self.stream.x[image, self.trunk.prefix + at] if state is None else state)
        return torch.stack([*self.stream.x[image, : self.trunk.prefix], *states])


@pytest.mark.parametrize(
    "name", ["timm_vit_average", "timm_siglip", "timm_eva02_small", "hf_dinov2_classifier"]
)
@every_way
def test_every_patch_gets_the_state_of_what_carries_it(name: str, way: str) -> None:
    model = reduced(build(name, dtype=F64), way)
    followed = Followed(trunk_of(model))
    run(model, images(model, batch=3))
    assert len(followed.steps) >= 3
    assert followed.stream is not None
    assert followed.stream.x.shape[1] < PATCHES // 2 + followed.trunk.prefix
    for image in range(3):
        assert torch.equal(followed.out[image], followed.slowly(image))


@every_way
def test_sizes_count_the_patches_that_a_token_stands_for(way: str) -> None:
    model = reduced(build("timm_vit_average", dtype=F64), way)
    followed = Followed(trunk_of(model))
    run(model, images(model))
    stream = followed.stream
    assert stream is not None
    assert stream.carriers is not None
    if stream.sizes is None:
        assert way == "dropped"
        return
    assert stream.sizes.shape[1] == stream.x.shape[1] - followed.trunk.prefix
    if way in ("merged", "protected"):
        counted = torch.stack(
            [torch.bincount(row, minlength=stream.sizes.shape[1]) for row in stream.carriers]
        )
        assert torch.equal(stream.sizes, counted.to(F64))


class Pick(Reducer):
    """Keeps the patches at fixed places."""

    def __init__(self, *places: int) -> None:
        super().__init__()
        self.places = places

    @property
    def fused(self) -> int:
        return 0

    def forward(
        self, x: Tensor, attended: Attended, prefix: int, sizes: Tensor | None
    ) -> Reduction:
        places = torch.tensor(self.places).expand(len(x), -1)
        assert attended.k.shape[2] == attended.q.shape[2] == x.shape[1]
        carriers = torch.full((len(x), x.shape[1] - prefix), -1)
        carriers[:, list(self.places)] = torch.arange(len(self.places))
        kept = None if sizes is None else sizes.gather(1, places)
        return Reduction(take(x, behind(places, prefix)), places, carriers, kept)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("name", ["timm_vit", "timm_eva02_small_class"])
def test_reducers_in_one_block_act_in_turn(name: str, restore: bool) -> None:
    model = build(name, dtype=F64)
    other = copy.deepcopy(model)
    for changed, picks in (
        (model, [(1, 3, 5, 9), (0, 2)]),
        (other, [(1, 5)]),
    ):
        trunk = trunk_of(changed)
        trunk.restore = restore
        for places in picks:
            trunk.reduce(1, Pick(*places))
    x = images(model)
    assert torch.equal(run(model, x), run(other, x))
    trunk, spied = trunk_of(model), Followed(trunk_of(model))
    run(model, x)
    expected = PATCHES if restore else 2
    assert spied.out.shape[1] == expected + trunk.prefix


def test_where_no_attention_came_before_all_tokens_go_on() -> None:
    from peft_vision.layers.absent import Absent

    model = build("timm_vit")
    trunk_of(model).reduce(0, Pick(1, 2))
    model.blocks[0].blocks[0].attn = Absent()  # type: ignore[index]
    followed = Followed(trunk_of(model))
    run(model, images(model))
    assert not followed.steps


@pytest.mark.parametrize("name", ["timm_siglip", "timm_eva_dinov3", "hf_vit"])
@pytest.mark.parametrize("way", ["protected", "merged, then dropped"])
def test_recomputing_gives_the_same_gradients(name: str, way: str) -> None:
    model = reduced(build(name, dtype=F64), way).train()
    x, found = images(model), []
    for on in (False, True):
        view(model).set_checkpointing(on)
        model.zero_grad()
        features(model(x)).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 20
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["timm_vit", "timm_vit_average", "timm_eva_dinov3"])
@pytest.mark.parametrize("way", ["merged", "dropped"])
@pytest.mark.parametrize("adapter", ["lora", "vpt"])
@pytest.mark.parametrize("first", [False, True], ids=["adapter last", "adapter first"])
def test_adapters_compose_and_train(
    name: str, way: str, adapter: str, first: bool, tmp_path: Path
) -> None:
    dense = build(name)
    model, x = copy.deepcopy(dense), images(dense)
    order = [(adapter, {}), *WAYS[way]] if first else [*WAYS[way], (adapter, {})]
    for method, settings in order:
        model = pv.wrap(model, method, **settings)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    found = Followed(trunk_of(model.plain_model))
    before = run(model, x)
    assert found.steps
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(run(pv.load(tmp_path / "out", base=dense), x), before)


EXPORTED = [
    ("timm_vit", {"class_token": False, "global_pool": "map"}, "onnx"),
    ("timm_eva02", {"global_pool": "avg"}, "onnx"),
    ("hf_dinov2", {"num_labels": 5}, "torch.export"),
]


@pytest.mark.parametrize(("name", "settings", "format"), EXPORTED)
def test_it_exports_for_any_batch(
    name: str, settings: dict[str, object], format: str, tmp_path: Path
) -> None:
    """One block that merges and then drops: what longer models repeat."""
    factory = {"timm_vit": timm_vit, "timm_eva02": eva02_small, "hf_dinov2": hf_dinov2_classifier}
    depth = {"num_hidden_layers" if name.startswith("hf") else "depth": 1}
    model = factory[name](**settings, **depth)
    model = pv.wrap(pv.wrap(model, MERGE, ratio=0.2), DROP, keep_rate=0.5, at=(0.0,))
    assert [len(list(r.modules())) for r in trunk_of(unwrap(model)).reducers.values()] == [3]
    path = tmp_path / ("m.onnx" if format == "onnx" else "m.pt2")
    export(model, path, format=format, image_size=32)
    x = images(unwrap(model), batch=5)
    got = run_onnx(path, x) if format == "onnx" else torch.export.load(path).module()(x)
    torch.testing.assert_close(features(got), run(model, x), rtol=1e-4, atol=1e-5)


def test_a_stream_without_attention_is_refused_by_name() -> None:
    from peft_vision.layers.absent import Absent

    model = build("timm_vit")
    for block in model.blocks:
        block.attn = Absent()
    with pytest.raises(UnsupportedSite, match="no attention left"):
        pv.wrap(model, MERGE)
