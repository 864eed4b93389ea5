"""The architectures of docs/architectures.md: a tiny model of each is merged whole, or refused."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from helpers import OPTIONS, merge, tensors_of
from helpers.architectures import architectures, family
from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_pave.errors import PaveError
from mergekit_pave.models.checkpoint import Checkpoint, read
from mergekit_pave.models.planned import plan
from mergekit_pave.plugin import register

register()
TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Architectures

Of the {all} classes that transformers {transformers} lists for text, images, both and
speech, and that mergekit {mergekit} has definitions of, {merged} are merged whole and {refused} are
refused; of the others no small model can be made by rule. Each was merged with `tsv_m` from a tiny
random base and two fine-tunes: every tensor of the three is in the merge, what no fine-tune changed
is as in the base, all else is not, and transformers loads the merge without a missing weight. What
the merge is planned by stands beside each. `python tests/models/test_architectures.py` prints this
page.

| class | planned by |
|---|---|
"""
ROW = re.compile(r"\| `(\w+)` \| (.+) \|")


def rows() -> dict[str, str]:
    return dict(ROW.findall(TABLE.read_text("utf-8")))


def outcome(folder: Path, name: str) -> str:
    """What the table says of a class; an `AssertionError` where a merge loses something."""
    try:
        paths = family(folder, name)
    except Exception:  # a setting that the rules made unfit
        return "not tried: no small model by rule"
    raw = {"merge_method": "tsv_m", "base_model": str(paths[0]), "dtype": "float32",
           "models": [{"model": str(path)} for path in paths[1:]]}
    try:
        how = planned(raw)
        merge(raw, folder / "out")
    except PaveError as fault:
        return "refused: " + str(fault).replace(f"{folder}/", "").replace("|", "/")
    items = [read(ModelReference.model_validate(str(path)), OPTIONS) for path in paths]
    refuse_lost(items, folder / "out")
    states = [loaded(name, path) for path in (*paths, folder / "out")]
    compare_values(*states)
    return how


def planned(raw: dict) -> str:
    config = MergeConfiguration.model_validate(raw)
    found = {model: read(model, OPTIONS) for model in config.referenced_models()}
    base = found[config.base_model]
    architecture = plan(config, found, OPTIONS).architecture
    if architecture == arch_info_for_config(base.config):
        return "mergekit's definition"
    return "mergekit's inference" if architecture.architectures else "the checkpoints' names"


def refuse_lost(models: list[Checkpoint], out: Path) -> None:
    """Every tensor of the models is in the merge, by its name or by that of its class."""
    merged = tensors_of(out)
    there = {*merged, *(target for name in merged for target in models[0].own.of(name))}
    for item in models:
        lost = [name for name in item.headers if name not in there and not item.is_harmless(name)
                and not (item.own.of(name) and there.issuperset(item.own.of(name)))]
        assert not lost, (item.label, lost)


def loaded(name: str, path: Path) -> dict[str, torch.Tensor]:
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model.state_dict()


def compare_values(base: dict, *others: dict) -> None:
    """What no fine-tune has changed is as in the base, and all else is not."""
    *tuned, merged = others
    for name, tensor in base.items():
        same = all(torch.equal(part[name], tensor) for part in tuned)
        assert torch.equal(merged[name], tensor) == same, name


def table() -> str:
    """docs/architectures.md, measured anew."""
    found = {}
    for name in architectures():
        with TemporaryDirectory() as folder:
            found[name] = outcome(Path(folder), name)
    return HEAD.format(
        transformers=transformers.__version__, mergekit=version("mergekit"), all=len(found),
        merged=sum(not said.startswith(("refused", "not tried")) for said in found.values()),
        refused=sum(said.startswith("refused") for said in found.values()),
    ) + "".join(f"| `{name}` | {said} |\n" for name, said in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", rows() if TABLE.exists() else ())
def test_nothing_of_an_architecture_is_lost(tmp_path, name):
    assert outcome(tmp_path, name) == rows()[name]


def test_the_table_has_every_architecture():
    known = re.search(r"transformers (\S+) lists", TABLE.read_text("utf-8"))[1]
    if known == transformers.__version__:
        assert [*rows()] == [*architectures()]
    assert set(rows().values()) <= {
        "mergekit's definition", "mergekit's inference", "the checkpoints' names"} | {
            said for said in rows().values() if said.startswith(("refused: ", "not tried: "))}


if __name__ == "__main__":
    print(table())  # noqa: T201
