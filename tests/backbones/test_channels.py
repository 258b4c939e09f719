"""Channels traced through any model: cut is the same as masked, and nothing uncertain is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.backbones._channel_sites import Member
from peft_vision.backbones.channels import ChannelsSite, channels, keep_channels
from peft_vision.cost import count_flops, twin
from peft_vision.errors import DamagedArtifact, UnsupportedSite
from peft_vision.method import Evidence, make
from tests.families import scramble


def conv(inputs: int, outputs: int, side: int = 3, **settings: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, padding=side // 2, **settings), nn.BatchNorm2d(outputs)
    )


class Net(nn.Module):
    """A stem, a body that a test is about, pooling and a classifier."""

    def __init__(self, body: nn.Module, width: int = 12, out: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=8)
        self.stem = conv(3, width)
        self.body = body
        self.fc = nn.Linear(out or width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.stem(x)))
        return self.fc(x.mean((2, 3)) if x.dim() == 4 else x)


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module, scale: int | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.scale = nn.Parameter(torch.ones(scale)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + (y if self.scale is None else y * self.scale.view(1, -1, 1, 1))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Dense(nn.Module):
    """Each layer reads all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(12, 6), conv(18, 6), conv(24, 6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return x


class Gated(nn.Module):
    """An MLP whose first linear holds gate and value, of two packed layouts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 20), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x.permute(0, 2, 3, 1)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * value).permute(0, 3, 1, 2)


class Turned(nn.Module):
    """A linear over pixels, as in a mixer: channels and units in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 10), nn.Linear(10, 64)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.down(torch.relu(self.up(x.flatten(2))))
        return x + mixed.reshape(x.shape)


BODIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual": (
        lambda: nn.Sequential(
            Residual(conv(12, 10), nn.ReLU(), conv(10, 12)), conv(12, 16), nn.ReLU()
        ),
        16,
    ),
    "depthwise": (lambda: nn.Sequential(conv(12, 12, 5, groups=12), nn.GELU(), conv(12, 9)), 9),
    "multiplier": (lambda: nn.Sequential(conv(12, 24, groups=12), nn.ReLU(), conv(24, 9)), 9),
    "groups": (
        lambda: nn.Sequential(conv(12, 24, 1), conv(24, 16, groups=8), nn.ReLU(), conv(16, 9)),
        9,
    ),
    "wide_groups": (
        lambda: nn.Sequential(conv(12, 24, 1), conv(24, 16, groups=2), nn.ReLU(), conv(16, 9)),
        9,
    ),
    "gate": (lambda: nn.Sequential(conv(12, 12), Gate(12), conv(12, 9)), 9),
    "concatenation": (Dense, 30),
    "flattened": (
        lambda: nn.Sequential(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(48, 20), nn.ReLU()),
        20,
    ),
    "layer_scale": (lambda: Residual(conv(12, 12, groups=12), conv(12, 12, 1), scale=12), 12),
    "gated_mlp": (lambda: Gated(12), 12),
    "over_pixels": (Turned, 12),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(12, 8, 2, 2), nn.ReLU(), conv(8, 10)),
        10,
    ),
    "upsampled": (
        lambda: nn.Sequential(
            nn.AvgPool2d(2), conv(12, 8), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), conv(8, 9)
        ),
        9,
    ),
}
"""Name -> a body for `Net`, and how many channels leave it."""


def halved(site: ChannelsSite, seed: int = 0) -> tuple[list[int], list[int]]:
    """Units that stay, and that go, at random."""
    order = torch.randperm(site.count, generator=torch.Generator().manual_seed(seed)).tolist()
    middle = max(1, site.count // 2)
    return sorted(order[:middle]), sorted(order[middle:])


def masked_and_cut(
    model: nn.Module, sites: tuple[ChannelsSite, ...]
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The model with nothing read from the units that go, and the one without them."""
    masked, decisions = copy.deepcopy(model), {}
    named = dict(masked.named_parameters())
    turned = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.ConvTranspose2d)
    }
    with torch.no_grad():
        for site in sites:
            kept, gone = halved(site)
            decisions[site.key] = site.decision(kept)
            for member in site.members:
                index = torch.as_tensor(member.positions[gone].ravel())
                for path in member.paths:
                    if member.dim == (0 if path in turned else 1):
                        named[path].index_fill_(member.dim, index, 0.0)
    cut = copy.deepcopy(model)
    keep_channels(view(cut), decisions)
    return masked, cut, decisions


@torch.no_grad()
def assert_cut_is_masked(model: nn.Module, x: Tensor, fewest: int = 1) -> None:
    sites = tuple(site for site in channels(view(model)) if not site.normed)
    assert len(sites) >= fewest
    masked, cut, decisions = masked_and_cut(model, sites)
    expected = masked(x)
    assert (cut(x) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (model(x) - expected).abs().max() > 1e-4 * expected.abs().max()
    fewer = sum(p.numel() for p in cut.parameters())
    assert fewer < sum(p.numel() for p in model.parameters())
    empty = twin(model)
    keep_channels(view(empty), decisions)
    shapes = {name: t.shape for name, t in empty.state_dict().items()}
    assert {name: t.shape for name, t in cut.state_dict().items()} == shapes


def tiny(body: str) -> nn.Module:
    make_body, out = BODIES[body]
    return scramble(Net(make_body(), out=out)).double()


IMAGE = (2, 3, 8, 8)


@pytest.mark.parametrize("body", sorted(BODIES))
def test_what_was_cut_is_what_was_masked(body: str) -> None:
    model = tiny(body)
    assert_cut_is_masked(model, torch.randn(IMAGE, dtype=torch.float64))


TIMM = {
    "test_resnet": 11,
    "test_byobnet": 10,
    "test_convnext": 6,
    "test_efficientnet": 10,
    "regnetx_002": 15,
    "mobilenetv3_small_050": 20,
    "ghostnet_050": 20,
    "poolformer_s12": 12,
    "inception_next_atto": 12,
    "resnest14d": 15,
}
"""Model -> at least so many groups of channels."""


@pytest.mark.parametrize("name", sorted(TIMM))
def test_timm_models_cut_as_masked(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = scramble(timm.create_model(name, pretrained=False, num_classes=5)).double()
    assert_cut_is_masked(model, torch.randn(1, 3, 64, 64, dtype=torch.float64), TIMM[name])


class Uncertain(nn.Module):
    """A body of 12 channels with an operation in its middle that ties or mixes them."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.what = conv(12, 12), conv(12, 12), what

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.what(self.first(x)))


def attended(x: Tensor) -> Tensor:
    q = k = v = x.flatten(2).unflatten(1, (3, 4)).transpose(2, 3)
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)


UNCERTAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "maximum": lambda x: x * x.amax(1, keepdim=True),
    "total": lambda x: x / (1 + x.abs().sum(1, keepdim=True)),
    "shuffle": lambda x: x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2),
    "hard_slice": lambda x: torch.cat([x[:, :5], x[:, 5:]], 1),
    "hard_split": lambda x: torch.cat(x.split([4, 8], 1)[::-1], 1),
    "constant": lambda x: x + torch.ones(12, 1, 1, device=x.device, dtype=x.dtype),
    "padded": lambda x: nn.functional.pad(x[:, :6], (0, 0, 0, 0, 3, 3)),
    "product": lambda x: (
        (x.flatten(2).transpose(1, 2) @ x.flatten(2)).unflatten(1, (8, 8)).sum(3)[:, None] + x
    ),
    "attention": attended,
    "norm_in_groups": lambda x: nn.functional.group_norm(x, 4),
    "sorted": lambda x: x.sort(1).values,
    "cumulated": lambda x: x.cumsum(1),
    "pixels": lambda x: (
        nn.functional.pixel_shuffle(x, 2)
        .unflatten(1, (1, 3))
        .mean(1)
        .repeat(1, 4, 1, 1)[:, :, ::2, ::2]
    ),
    "flipped": lambda x: x.flip(1),
}


@pytest.mark.parametrize("what", sorted(UNCERTAIN))
def test_what_is_not_certain_stays(what: str) -> None:
    model = scramble(Net(Uncertain(UNCERTAIN[what]))).double()
    sites = {site.key for site in channels(view(model)) if not site.normed}
    assert "body.first.0.channels" not in sites
    assert "stem.0.channels" in sites
    assert_cut_is_masked(model, torch.randn(IMAGE, dtype=torch.float64))


def test_a_norm_over_channels_is_told() -> None:
    body = nn.Sequential(conv(12, 12), nn.GroupNorm(1, 12), conv(12, 9))
    model = scramble(Net(body, out=9))
    normed = {site.key: site.normed for site in channels(view(model))}
    assert normed == {
        "stem.0.channels": False,
        "body.0.0.channels": True,
        "body.2.0.channels": False,
    }


def test_a_shared_weight_stays() -> None:
    body = nn.Sequential(conv(12, 12), conv(12, 10), conv(10, 8), conv(8, 12), conv(12, 12))
    body[4][0].weight = body[0][0].weight
    keys = {site.key for site in channels(view(scramble(Net(body))))}
    assert keys == {"body.1.0.channels", "body.2.0.channels"}


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(nn.functional.gelu(self.fc1(x)))))


def test_units_of_an_unknown_mlp() -> None:
    model = scramble(Perceptron()).double()
    assert [site.key for site in channels(view(model))] == ["fc1.channels", "fc2.channels"]
    assert_cut_is_masked(model, torch.randn(4, 6, dtype=torch.float64))


def test_a_model_that_looks_at_numbers_is_refused_by_name() -> None:
    class Looking(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if bool(x.sum() > 0) else -x)

    with pytest.raises(UnsupportedSite, match="Looking has no channels: it cannot be run without"):
        channels(view(Looking()))


@pytest.mark.parametrize("body", ["concatenation", "groups", "gate"])
def test_compress_meets_a_budget_and_reloads_bit_exactly(body: str, tmp_path: Path) -> None:
    model = scramble(Net(BODIES[body][0](), out=BODIES[body][1]))
    dense = copy.deepcopy(model)
    method = make("magnitude", {"multiple": 1})
    result = pv.compress(model, target_flops=0.6, methods=[method], image_size=8)
    assert 0.98 * 0.6 < result.ratio <= 0.6
    result.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=dense)
    x = torch.randn(IMAGE)
    assert torch.equal(again(x), result.model.eval()(x))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_a_new_classifier_after_the_last_channels_were_cut(name: str, tmp_path: Path) -> None:
    model = pv.create_model(f"timm/{name}", pretrained=False)
    cut = pv.wrap(model, "magnitude", ratio=0.5)
    cut.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), cut.eval()(x))
    plain = again.plain_model
    plain.reset_classifier(7)
    assert plain(x).shape == (1, 7)
    assert plain.num_features == plain.forward_features(x).shape[1]


def test_channels_stay_in_multiples_and_none_is_emptied() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", pretrained=False)
    method, evidence = make("magnitude"), Evidence()
    for strength in (0.3, 1.0):
        smaller = twin(model)
        method.apply(view(smaller), method.decide(view(model), strength, evidence))
        widths = {m.out_channels for m in smaller.modules() if isinstance(m, nn.Conv2d)}
        assert all(width % 8 == 0 and width > 0 for width in widths)
    whole = count_flops(twin(model), (3, 64, 64))
    assert count_flops(smaller, (3, 64, 64)) < 0.05 * whole


def test_the_plan_is_refused_where_it_does_not_fit() -> None:
    model = tiny("residual")
    site = channels(view(model))[0]
    decisions = {site.key: site.decision([0, 1, 2])}
    narrow = copy.deepcopy(model)
    keep_channels(view(narrow), decisions)
    with pytest.raises(UnsupportedSite, match="the plan cuts dimension 0 of 12"):
        keep_channels(view(narrow), decisions)
    model.stem[0] = nn.Sequential(model.stem[0])
    with pytest.raises(UnsupportedSite, match="wrapped or replaced"):
        keep_channels(view(model), decisions)
    with pytest.raises(DamagedArtifact, match="not a decision on channels"):
        keep_channels(view(model), {site.key: {"kept": {"of": 2, "bits": "3"}}})
    with pytest.raises(DamagedArtifact, match="positions that do not exist"):
        Member.from_json([["a.weight"], 0, 4, [0, 1, 1, 1], 0], 5)


def test_positions_survive_the_plan() -> None:
    for body in ("flattened", "groups", "wide_groups", "gated_mlp"):
        for site in channels(view(tiny(body))):
            for member in site.members:
                back = Member.from_json(member.to_json(), site.count)
                assert (back.positions == member.positions).all()
                assert (back.paths, back.dim, back.groups) == (
                    member.paths,
                    member.dim,
                    member.groups,
                )
