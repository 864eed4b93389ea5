"""The record that a merge leaves beside its model, by a real merge."""

from __future__ import annotations

import mergekit.merge
import pytest
import yaml
from conftest import write_texts
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_pave import record
from mergekit_pave.card import write_card


@pytest.mark.parametrize("card", [True, False])
def test_merge_leaves_its_record(tmp_path, families, card):
    paths = families("llama")
    data = write_texts(tmp_path / "rows.jsonl", rows=6)
    source = yaml.safe_dump({
        "merge_method": "pave_ties", "base_model": str(paths["base"]), "dtype": "float32",
        "parameters": {"weight": 1.0, "rank_ratio": 0.8,
                       "calibration_dataset": str(data)},
        "models": [{"model": str(paths[name])} for name in ("expert0", "expert1")]})
    options = MergeOptions(quiet=True, write_model_card=card, copy_tokenizer=False)
    out = tmp_path / "out"
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    mergekit.merge.run_merge(config, str(out), options, source)
    if not card:
        assert record.read(out) is None
        return
    facts = record.read(out)
    assert facts["merge_method"] == "pave_ties" and facts["tensors"]["purified"] == 14
    for name, model in zip(("expert0", "expert1"), facts["models"], strict=True):
        assert model["id"] == name and model["hub"] == []
        assert model["data"]["used"] == 6 and model["data"]["dataset"] == "rows.jsonl"
        assert len(model["ranks"]) == 14
        assert model["ranks"]["model.layers.0.mlp.up_proj.weight"][0] == 32
    both = [model["ranks"] for model in facts["models"]]
    for name, (full, _) in both[0].items():
        assert sum(ranks[name][1] for ranks in both) == int(0.2 * 2 * full + 0.5)
    text = write_card(out)
    assert "per tensor)" in text and "14 tensors were purified" in text
    texts = [path for path in out.iterdir() if path.suffix in (".md", ".yml", ".json")]
    assert all(str(tmp_path) not in path.read_text("utf-8") for path in texts)
