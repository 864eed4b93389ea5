"""What a merge says it did, against what it did."""

from __future__ import annotations

import json
import shutil

import torch
import yaml
from helpers import config_of, merge, recipe, source_of, spec_of, tensors_of
from mergekit.merge_methods import get, merge_tensors
from safetensors.torch import save_file

from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.methods.layers import MergeState
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.parameters import CovarianceSource
from mergekit_pave.report.survey import open_merge

NAME = "model.layers.0.mlp.up_proj.weight"


def test_a_weight_that_one_model_has_no_covariance_of_is_merged_plainly(families, texts, tmp_path):
    paths = families("llama")
    ids, stores = ["base", "expert0", "expert1"], {}
    for i, data in enumerate(texts):
        folder = tmp_path / f"store{i}"
        store = calibrate_to(source_of(paths[ids[i + 1]]), spec_of(data), folder, Resources())
        stores[ids[i + 1], CovarianceSource(store=str(folder))] = store
    tensors = [tensors_of(paths[name])[NAME] for name in ids]
    folders = {model: source.store for model, source in stores}
    outcome = []
    for missing in (False, True):
        state = MergeState(stores)
        if missing:
            del stores["expert1", CovarianceSource(store=folders["expert1"])].weights[NAME]
        merge_tensors(tensors, get("regmean").within(state), ids=ids, base_index=0, name=NAME,
                      parameters={"covariance": folders})
        outcome.append({what: len(names) for what, names in state.counts.items()})
    assert outcome == [{"purified": 1, "plain": 0}, {"purified": 0, "plain": 1}]


def test_a_sparse_change_is_purified_by_the_merge_and_in_the_report(families, texts, tmp_path):
    paths = dict(families("llama"))
    paths["expert0"] = shutil.copytree(paths["expert0"], tmp_path / "sparse")
    weights = tensors_of(paths["expert0"])
    weights[NAME] = tensors_of(paths["base"])[NAME].clone()
    weights[NAME].view(-1)[7] += 0.5
    save_file(weights, paths["expert0"] / "model.safetensors", metadata={"format": "pt"})
    raw = config_of(paths, "pave_task_arithmetic", texts, rank_ratio=0.9)
    merge(raw, tmp_path / "out", write_model_card=True)
    record = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(recipe(paths, texts)))
    report = open_merge(config, LoaderOptions(), torch.device("cpu"))
    of_report = {layer.name for layer in report.layers if 0 in layer.own}
    assert NAME in of_report and of_report == set(record["models"][0]["ranks"])
