"""Records of merges, and the text of a folder, for the tests of the card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import yaml
from mergekit.card import generate_card
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from helpers import make_store
from mergekit_pave.models.names import is_local, name_of
from mergekit_pave.plugin import register
from mergekit_pave.publish import record
from mergekit_pave.recipe.inputs import calibration_spec, purifies
from mergekit_pave.recipe.recipe import Recipe

HUB = """\
merge_method: pave_ties
base_model: meta-llama/Llama-2-7b-hf
models:
  - model: WizardLMTeam/WizardMath-7B-V1.0
    parameters: {weight: 1.0, density: 0.2, calibration_dataset: openai/gsm8k,
                 calibration_config: main, text_column: "question,answer"}
  - model: WizardLMTeam/WizardMath-7B-V1.0@other
    parameters: {weight: 1.0, density: 0.2, calibration_dataset: openai/gsm8k}
  - model: RedHatAI/Llama-2-7b-evolcodealpaca
    parameters: {weight: 0.5, density: 0.2, calibration_dataset: code.jsonl}
parameters: {rank_ratio: 0.98}
"""


def make_output(folder: Path, source: str) -> Path:
    """What mergekit leaves in its output folder, without the weights."""
    folder.mkdir(parents=True)
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    (folder / "README.md").write_text(generate_card(config, source, folder.name), "utf-8")
    (folder / "mergekit_config.yml").write_text(source, "utf-8")
    register()
    record.write(folder, as_asked(Recipe.of(yaml.safe_load(source))))
    return folder


def as_asked(recipe: Recipe) -> record.Record:
    """The record of a merge that found all data which its configuration names."""

    def model(entry) -> record.OfModel:
        data = None
        if entry.calibrated and entry.get("calibration_dataset") and not entry.get("covariance"):
            spec = calibration_spec(entry)
            data = {"dataset": name_of(spec.dataset), "local": is_local(spec.dataset),
                    "config": spec.config, "split": spec.split, "used": spec.num_samples}
        found = record._names(entry.model)
        return record.OfModel(*found, data, None, None)

    counted = purifies(recipe.method) or getattr(recipe.inner, "solves", False)
    base = record.Parent(*record._names(recipe.config.base_model))
    return record.Record(
        recipe.config.merge_method, "0.1.0", record.Counts(2, 1) if counted else None, base,
        tuple(map(model, recipe.inputs)))


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
