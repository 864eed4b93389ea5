"""Numbers that are none, and layers that cannot be observed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import recipe, tensors_of, write_tokenizer
from helpers.refusals import merge, refused, rewrite

from mergekit_pave.storage.covariances import MANIFEST, CovarianceStore


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["self_attn.q_proj.weight", "input_layernorm.weight"])
def test_checkpoint_with_broken_weights(good, families, tmp_path, value, place):
    name = f"model.layers.1.{place}"
    broken = rewrite(families("llama")["expert0"], tmp_path / "broken",
                     lambda weights: weights[name].view(-1)[3:4].fill_(value))
    good["models"][0]["model"] = str(broken)
    text = refused(good, tmp_path / "out")
    assert name in text and "broken" in text and "NaN or Inf" in text
    assert not list((tmp_path / "cache").rglob(MANIFEST))


def test_base_with_broken_weights(good, families, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = rewrite(families("llama")["base"], tmp_path / "broken",
                     lambda weights: weights[name][3:4].fill_(float("nan")))
    good["base_model"] = str(broken)
    text = refused(good, tmp_path / "out")
    assert name in text and "broken" in text and "download or save that checkpoint again" in text


def test_activations_that_overflow(good, families, tmp_path):
    def edit(weights):
        for name in ("gate_proj", "up_proj"):
            weights[f"model.layers.0.mlp.{name}.weight"].mul_(1e25)

    huge = rewrite(families("llama")["expert0"], tmp_path / "huge", edit)
    good["models"][0]["model"] = str(huge)
    text = refused(good, tmp_path / "out")
    assert "NaN or Inf in calibration batch" in text and "overflows" in text and "huge" in text
    assert not list((tmp_path / "cache").rglob(MANIFEST))


def test_a_model_that_passes_nothing_on(good, families, tmp_path):
    """Its norms divide by an overflowed number: every input is zero, none is NaN."""
    huge = rewrite(families("llama")["expert0"], tmp_path / "huge",
                   lambda weights: weights["model.embed_tokens.weight"].mul_(1e30))
    good["models"][0]["model"] = str(huge)
    assert "No linear layer of huge saw an input other than zero" in refused(good, tmp_path / "o")
    assert not list((tmp_path / "cache").rglob(MANIFEST))


def test_inputs_that_are_always_zero(good, families, tmp_path, caplog):
    """A dead MLP: its output layer's covariance says nothing, so it is merged plainly."""
    dead = rewrite(families("llama")["expert0"], tmp_path / "dead",
                   lambda weights: weights["model.layers.0.mlp.up_proj.weight"].zero_())
    good["models"][0]["model"] = str(dead)
    merged = merge(good, tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in merged.values())
    name = "model.layers.0.mlp.down_proj.weight"
    stores = map(CovarianceStore, (p.parent for p in (tmp_path / "cache").rglob(MANIFEST)))
    reasons = [store.skipped[name] for store in stores if name in store.skipped]
    assert len(reasons) == 1 and "zero" in reasons[0]
    assert name in caplog.text


@pytest.mark.parametrize("place", ["up_proj", "q_proj"])
def test_result_that_is_not_finite(published, tmp_path, place):
    published["models"][0]["parameters"]["weight"] = [
        {"filter": place, "value": 1e300}, {"value": 0.5}]
    text = refused(published, tmp_path / "out")
    assert place in text and "NaN or Inf" in text and "lower the weights" in text


def test_result_that_its_dtype_cannot_hold(published, tmp_path):
    """Finite in float32, in which it is computed; infinite in the float16 that was asked for."""
    published["dtype"] = "float16"
    published["models"][0]["parameters"]["weight"] = [
        {"filter": "up_proj", "value": 1e7}, {"value": 0.5}]
    text = refused(published, tmp_path / "out")
    assert "up_proj" in text and "NaN or Inf" in text


def test_weight_zero_by_filter_contributes_nothing(published, tmp_path):
    """The other models' purification does not depend on a model that is not used."""
    zero = [{"filter": "mlp", "value": 0}, {"value": 0.5}]
    published["models"][0]["parameters"]["weight"] = zero
    both = merge(published, tmp_path / "both")
    published["models"].pop(0)
    one = merge(published, tmp_path / "one")
    for name in both:
        assert ("mlp" not in name) or torch.equal(both[name], one[name])


def test_a_fine_tune_that_equals_its_base(published, families, texts, tmp_path):
    same = shutil.copytree(families("llama")["base"], tmp_path / "same")
    published["models"] = [{"model": str(same), "parameters": {
        "weight": 1.0, "calibration_dataset": str(texts[0])}}]
    merged, base = merge(published, tmp_path / "out"), tensors_of(same)
    assert all(torch.equal(merged[name], base[name]) for name in merged)


# --- layers that cannot be observed ---------------------------------------------------------


def family_of(model, folder: Path) -> dict[str, Path]:
    """Base and two fine-tunes of any model, with the conftest's tokenizer."""
    paths = {}
    for name in ("base", "expert0", "expert1"):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        paths[name] = folder / name
        model.save_pretrained(paths[name])
        write_tokenizer(paths[name])
    return paths


def test_a_linear_layer_whose_weight_is_used_directly(texts, tmp_path, caplog):
    """Mamba multiplies by `dt_proj.weight` without calling `dt_proj`."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=94, hidden_size=32, num_hidden_layers=1, state_size=4, bos_token_id=1,
        eos_token_id=2, pad_token_id=0)
    paths = family_of(transformers.MambaForCausalLM(config), tmp_path)
    raw = recipe(paths, texts, num_calibration_samples=4)
    merged = merge(raw, tmp_path / "out")
    store = CovarianceStore(next((tmp_path / "cache").rglob(MANIFEST)).parent)
    name = "backbone.layers.0.mixer.dt_proj.weight"
    assert "never seen" in store.skipped[name] and name not in store.weights
    assert "backbone.layers.0.mixer.in_proj.weight" in store.weights
    assert "keep the plain task vector" in caplog.text and name in caplog.text
    own = [tensors_of(paths[f"expert{i}"])[name] for i in range(2)]
    assert torch.allclose(merged[name], (own[0] + own[1]) / 2, atol=1e-6)


def test_fused_experts(texts, tmp_path, caplog):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=94, num_hidden_layers=1, hidden_size=32, intermediate_size=48, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    paths = family_of(transformers.Qwen3MoeForCausalLM(config), tmp_path)
    merged = merge(recipe(paths, texts, rank_ratio=0.7), tmp_path / "out")
    assert "fused experts" in caplog.text
    own = [tensors_of(paths[f"expert{i}"]) for i in range(2)]
    plain = {name: (own[0][name] + own[1][name]) / 2 for name in own[0] if name in merged}
    changed = {n for n in plain if not torch.allclose(merged[n], plain[n], atol=1e-6)}
    assert not [name for name in plain if ".experts." in name]  # mergekit fuses them too
    assert {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"} == changed


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_weights_that_float16_cannot_hold(families, tmp_path, key):
    models = [rewrite(families("llama")[name], tmp_path / name,
                      lambda weights: weights["model.layers.0.mlp.up_proj.weight"].mul_(1e9))
              for name in ("base", "expert0")]
    raw = {"merge_method": "tsv_m", "base_model": str(models[0]), "dtype": "float32",
           "models": [{"model": str(models[1])}]}
    assert len(merge(raw, tmp_path / "good"))
    text = refused({**raw, key: "float16"}, tmp_path / "out")
    assert "up_proj" in text and "is too large for" in text and "float32" in text
