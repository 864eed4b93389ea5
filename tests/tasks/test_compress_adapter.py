"""`mergekit-pave compress --lora`: the adapter against the model it stands for."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from helpers import tensors_of
from helpers.compress import raw

from mergekit_pave.errors import PaveError
from mergekit_pave.storage.low_rank import Compressed
from mergekit_pave.tasks.compress import compress
from mergekit_pave.tasks.reconstruct import reconstruct


@pytest.mark.parametrize(("kind", "cls"), [
    ("llama", "AutoModelForCausalLM"), ("roberta", "AutoModelForSequenceClassification"),
])
def test_the_adapter_gives_the_same_linear_weights(families, tmp_path, kind, cls):
    paths = families(kind)
    made = raw(paths)
    summary = compress(made, tmp_path / "c", lora=True)[0]
    task = tmp_path / "c" / "expert0"
    reconstruct(task, tmp_path / "m", base=str(paths["base"]))
    full = getattr(transformers, cls).from_pretrained(tmp_path / "m").state_dict()
    model = getattr(transformers, cls).from_pretrained(paths["base"])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    adapted = peft.PeftModel.from_pretrained(model, task / "lora").merge_and_unload().state_dict()
    ranks = json.loads((task / "lora" / "adapter_config.json").read_text())["rank_pattern"]
    # Square matrices are smaller whole when two tasks share them.
    assert set(ranks) == ({n for n in ranks if "self_attn" in n} or {"classifier.out_proj"})
    kept = Compressed(task).tensors
    inside = {n for n in kept if n in linear and kept[n].how == "factors"}
    assert summary.adapter == len(inside) >= (11 if kind == "llama" else 5)
    for name, tensor in adapted.items():
        want = full[name] if name in inside else before[name]
        assert torch.allclose(tensor, want, atol=1e-5), name
    changed = {n for n in kept if kept[n].how != "base"}
    assert summary.left_out == len(changed - inside) > 0
    assert f"LoRA adapter has {len(inside)} linear weights; {summary.left_out} changed" in str(
        summary)


def test_a_small_change_of_a_square_matrix_is_an_adapter(families, tmp_path):
    """Two tasks may have half of the rank each, but theirs is 4."""
    paths = dict(families("llama"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    for i in range(2):
        torch.manual_seed(i)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"],
                                   init_lora_weights=False)
        tuned = peft.get_peft_model(load(paths["base"]), settings).merge_and_unload()
        paths[f"expert{i}"] = tmp_path / f"adapted{i}"
        tuned.save_pretrained(paths[f"expert{i}"])
    summary = compress(raw(paths), tmp_path / "c", lora=True)[0]
    assert summary.ways == {"base": 15, "rows": 0, "factors": 6, "whole": 0}
    assert summary.adapter == 6 and summary.left_out == summary.too_large == 0
    task = tmp_path / "c" / "adapted0"
    kept = Compressed(task).tensors
    assert {part.rank for part in kept.values()} == {None, 4}
    reconstruct(task, tmp_path / "m", base=str(paths["base"]))
    want, found = tensors_of(paths["expert0"]), tensors_of(tmp_path / "m")
    again = peft.PeftModel.from_pretrained(load(paths["base"]), task / "lora").merge_and_unload()
    for name, tensor in again.state_dict().items():
        if name in want:
            assert torch.allclose(tensor, want[name], atol=1e-5), name
            assert torch.allclose(found[name], want[name], atol=1e-5), name


def test_a_model_without_linear_layers_has_no_adapter(families, tmp_path):
    with pytest.raises(PaveError, match="no changed nn.Linear weight .* leave --lora out"):
        compress(raw(families("gpt2")), tmp_path / "c", lora=True, rank_fraction=0.25)
    assert not list((tmp_path / "c").iterdir())
