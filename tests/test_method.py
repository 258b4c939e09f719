"""How methods are found: by file stem, and by entry point for those of third parties."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision import presets
from peft_vision.backbones.sites import Backbone
from peft_vision.errors import ArtifactError, BadSetting, UnknownName
from peft_vision.method import Evidence, Method, find, make, name_of, names
from peft_vision.plan import Decisions, pack_indices, unpack_indices

Tiny = Callable[..., nn.Module]


@dataclass(frozen=True)
class FirstUnits(Method):
    """Keeps the first units: somebody else's method."""

    share: float = 0.5

    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params"})

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        return {
            site.key: pack_indices(range(int(site.count * self.share)), of=site.count)
            for site in backbone.hidden
        }

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        for site in backbone.hidden:
            site.keep(unpack_indices(decisions[site.key]))


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("somebodys_package")
    module.FirstUnits = FirstUnits  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_package", module)
    point = EntryPoint("first_units", "somebodys_package:FirstUnits", "peft_vision.methods")
    monkeypatch.setattr("peft_vision.method.entry_points", lambda group: [point])
    return "first_units"


def test_names_and_classes_agree() -> None:
    for name in names():
        assert name_of(make(name)) == name
        assert issubclass(find(name), Method)


def test_a_third_party_method_is_found_saved_and_loaded(
    tiny_timm: Tiny, third_party: str, tmp_path: Path
) -> None:
    assert third_party in names()
    model = pv.wrap(tiny_timm(), third_party, share=0.25)
    x = torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(pv.load(tmp_path / "out")(x), model.eval()(x))


def test_without_the_package_loading_says_what_is_lacking(tiny_timm: Tiny, tmp_path: Path) -> None:
    pv.wrap(tiny_timm(), FirstUnits()).save_pretrained(tmp_path / "out")
    with pytest.raises(ArtifactError, match="lacks"):
        pv.load(tmp_path / "out")


def test_settings_of_a_method_object_are_its_own(tiny_timm: Tiny) -> None:
    with pytest.raises(BadSetting, match="its own"):
        pv.wrap(tiny_timm(), FirstUnits(), share=0.1)


def test_presets_expand_to_methods_that_exist() -> None:
    assert presets.names()
    for preset in presets.names():
        for name, settings in presets.expand(preset):
            make(name, settings)
        assert presets.read(preset)["about"]


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="Nearest"):
        find("magnitudes")
    with pytest.raises(BadSetting, match="Did you mean 'ratio'"):
        make("magnitude", {"ration": 0.5})
