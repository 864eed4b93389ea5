"""Records of merges, and the text of a folder, for the tests of the card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import yaml
from mergekit.common import ModelReference

from helpers import make_store
from mergekit_pave.publish import record
from mergekit_pave.recipe.recipe import Recipe


def texts_of(folder: Path) -> str:
    return "\n".join(path.read_text("utf-8") for path in sorted(folder.iterdir()))


def kept(tmp_path, **ranks) -> SimpleNamespace:
    models = {
        ModelReference.model_validate(name.replace("__", "/")): r for name, r in ranks.items()}
    stores = {model: make_store(tmp_path / str(i), rows=32) for i, model in enumerate(models)}
    return SimpleNamespace(
        counts={"purified": {"a", "b"}, "plain": {"c"}}, used=stores, ranks=models,
        data_free=frozenset())


BEGIN = "<!-- mergekit-pave: begin -->"
MATH = {"WizardLMTeam__WizardMath-7B-V1.0": {"a": (9, 1)}}


def recorded_as(out: Path, state: SimpleNamespace, **changes) -> None:
    """The record that a merge with that outcome leaves."""
    raw = yaml.safe_load((out / "mergekit_config.yml").read_text("utf-8"))
    record.write(out, record.of_merge(Recipe.of({**raw, **changes}), state))
