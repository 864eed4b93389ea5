"""RegMean against its normal equations, alone and purified, with data and without."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import (
    config_of,
    make_family,
    merge,
    moment,
    papers_formula,
    readers,
    reference,
    spec_of,
    tensors_of,
)
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file

from mergekit_pave.algebra.numeric import rounding
from mergekit_pave.algebra.separation import flattened, regmean
from mergekit_pave.errors import PaveError
from mergekit_pave.plugin import run_merge


def closed_form(weights, covariances, off_diagonal, shares=None):
    """`(sum w W C) (sum w C)^-1` of whole weights in float64, as the paper writes it."""
    shares = shares or [1.0] * len(weights)
    scaled = [share * (off_diagonal * c.double() + (1 - off_diagonal) * c.double().diag().diag())
              for share, c in zip(shares, covariances, strict=True)]
    top = sum(w.double() @ c for w, c in zip(weights, scaled, strict=True))
    return top @ torch.linalg.inv(sum(scaled))


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_it_solves_the_normal_equations(off_diagonal):
    torch.manual_seed(0)
    base, *weights = torch.randn(4, 10, 16)
    covariances = [moment(16, seed=i) for i in range(3)]
    shares = [1.0, 2.0, 0.5]
    got = base + regmean([w - base for w in weights], readers(covariances), shares, off_diagonal)
    expected = closed_form(weights, covariances, off_diagonal, shares)
    assert (got - expected).norm() < 1e-5 * (expected - base).norm()


def test_nothing_beats_it_on_its_own_objective():
    torch.manual_seed(1)
    deltas, covariances = list(torch.randn(2, 6, 12).double()), [moment(12, seed=i) for i in (3, 4)]

    def loss(delta):
        gaps = [delta - d for d in deltas]
        return sum((g @ c.double() * g).sum() for g, c in zip(gaps, covariances, strict=True))

    best = regmean(deltas, readers(covariances), [1.0, 1.0], 1.0)
    assert all(loss(best) < loss(best + 0.01 * torch.randn(6, 12)) for _ in range(20))
    assert loss(best) < loss(sum(deltas) / 2)


def test_equal_covariances_give_the_mean_and_one_model_itself():
    torch.manual_seed(2)
    deltas = list(torch.randn(3, 5, 8).double())
    mean = regmean(deltas, readers([moment(8)] * 3), [1.0] * 3, 0.9)
    assert torch.allclose(mean, sum(deltas) / 3, atol=1e-6)
    alone = regmean(deltas[:1], readers([moment(8)]), [1.0], 0.9)
    assert torch.allclose(alone, deltas[0], atol=1e-6)


def test_a_dead_feature_divides_nothing_by_zero():
    dead = moment(8)
    dead[3], dead[:, 3] = 0, 0
    for mu in (1.0, 0.5):
        merged = regmean(torch.randn(2, 4, 8), readers([dead, dead]), [1.0, 1.0], 0.9, mu)
        assert merged.isfinite().all()
    with pytest.raises(ValueError, match="empty"):
        regmean(torch.randn(1, 4, 8), readers([torch.zeros(8, 8)]), [1.0], 0.9)


@pytest.mark.parametrize("averaging", [1.0, 0.5])
def test_covariances_without_full_rank_need_no_damping_of_the_users(averaging):
    """As float32 keeps them, their null space has eigenvalues below zero."""
    torch.manual_seed(0)
    delta, x = torch.randn(8, 256), torch.randn(60, 256) * torch.logspace(1, -1, 256)
    covariance = x.T @ x / 60
    assert torch.linalg.eigvalsh(covariance.double())[0] < -1e-7
    got = regmean([delta, delta], readers([covariance] * 2), [1.0, 1.0], 1.0, averaging)
    kept = (got @ x.double().T).norm() / (delta @ x.T).norm()
    assert abs(kept - 1 / (averaging if averaging == 1 else (1 + averaging) / 2)) < 1e-2


def test_flattening_keeps_directions_and_their_mean_strength():
    torch.manual_seed(4)
    delta = torch.randn(6, 9).double() @ torch.logspace(0, -2, 9).diag().double()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    even = flattened(delta, 1.0)
    assert torch.allclose(even, s.mean() * u @ vh)
    half = u * (s.sqrt() * s.mean() / s.sqrt().mean()) @ vh
    assert torch.allclose(flattened(delta, 0.5), half)
    assert flattened(delta, 0.0) is delta
    low_rank = (u[:, :2] * s[:2]) @ vh[:2]
    assert torch.linalg.matrix_rank(flattened(low_rank, 1.0), rtol=1e-6) == 2
    assert not flattened(torch.zeros(3, 4), 0.5).any()
    assert flattened(delta, 0.5, 2 * s[0].item()) is delta  # nothing but noise


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("flattening", [0.5, 1.0])
def test_flattening_raises_no_rounding(size, flattening):
    """Of adapters that were merged into float32 weights."""
    torch.manual_seed(5)
    weight, delta = torch.randn(96, 128), torch.randn(96, 9).double() @ torch.randn(9, 128).double()
    delta *= size * weight.norm() / delta.norm()
    rounded = (weight + delta.float()).double() - weight.double()
    wanted = flattened(delta, flattening)
    found = flattened(rounded, flattening, rounding(weight))
    assert (found - wanted).norm() < 1e-5 / size * wanted.norm()


def test_averaging_goes_from_the_sum_to_regmean():
    torch.manual_seed(3)
    deltas, moments = list(torch.randn(3, 5, 8).double()), [moment(8, seed=i) for i in range(3)]
    shares = [1.0, 2.0, 0.5]
    results = {mu: regmean(deltas, readers(moments), shares, 1.0, mu)
               for mu in (0.0, 0.3, 1 - 1e-9, 1.0)}
    assert torch.allclose(results[0.0], sum(deltas), atol=1e-5)
    assert torch.allclose(results[1 - 1e-9], results[1.0], atol=1e-6)
    scaled = [share * c.double() for share, c in zip(shares, moments, strict=True)]
    expected = sum(d @ c @ torch.linalg.inv(c + 0.3 * (sum(scaled) - c))
                   for d, c in zip(deltas, scaled, strict=True))
    assert torch.allclose(results[0.3], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_stock_merge_solves_every_linear_layer(families, texts, tmp_path, kind):
    paths = families(kind)
    config = _config(paths, "regmean", texts)
    merged = merge(config, tmp_path / "out")
    base = tensors_of(paths["base"])
    experts = [tensors_of(paths[f"expert{i}"]) for i in range(2)]
    covariances = [reference(paths[f"expert{i}"], kind, spec_of(texts[i])) for i in range(2)]
    checked = 0
    for name, expected in base.items():
        key = name if name in covariances[0] else f"transformer.{name}"
        plain = sum(e[name] for e in experts) / 2
        if key in covariances[0] and "lm_head" not in key:
            weights = [e[name].T if kind == "gpt2" else e[name] for e in experts]
            expected = closed_form(weights, [c[key] for c in covariances], 0.9)
            expected = expected.T if kind == "gpt2" else expected
            assert (merged[name] - expected).norm() < 1e-4 * (expected - base[name]).norm(), name
            assert (expected - plain).norm() > 0.05 * (expected - base[name]).norm()
            checked += 1
        else:
            assert torch.allclose(merged[name], plain, atol=1e-6)
    assert checked >= 8


def _config(paths, method, texts, **shared):
    config = config_of(paths, method, texts, num_calibration_samples=40, **shared)
    calibrated = method not in ("tsv_m", "task_arithmetic")
    for model, data in zip(config["models"], texts, strict=True):
        model["parameters"] = {"calibration_dataset": str(data)} if calibrated else {}
    if not calibrated:
        del config["parameters"]["num_calibration_samples"]
    return config


def test_its_twin_solves_with_the_covariances_of_the_unpurified_models(families, texts, tmp_path):
    paths = families("llama")
    shared = {"rank_ratio": 0.8, "rank_allocation": "uniform"}
    merged = merge(_config(paths, "pave_regmean", texts, **shared), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    covariances = [reference(paths[f"expert{i}"], "llama", spec_of(texts[i]))[name]
                   for i in range(2)]
    weights = [papers_formula(tensors_of(paths[f"expert{i}"])[name], covariances[i], 0.8)
               for i in range(2)]
    expected = closed_form(weights, covariances, 0.9)
    base = tensors_of(paths["base"])[name]
    assert (merged[name] - expected).norm() < 1e-4 * (expected - base).norm()
    off = merge(_config(paths, "pave_regmean", texts, rank_ratio=1.0), tmp_path / "off")
    plain = merge(_config(paths, "regmean", texts), tmp_path / "plain")
    assert all(torch.equal(off[key], plain[key]) for key in plain)


def test_without_data_the_task_vectors_stand_in_for_the_inputs(families, tmp_path, monkeypatch):
    from mergekit_pave.calibration import stores

    monkeypatch.setattr(stores, "cached_store", None)  # calibrating would fail
    paths = families("gpt2")
    merged = merge(_config(paths, "regmean", ["none", "none"]), tmp_path / "out")
    name = "transformer.h.0.mlp.c_fc.weight"  # stored (in, out)
    base, *weights = (tensors_of(p)[name].double() for p in paths.values())
    moments = [(w - base) @ (w - base).T for w in weights]
    expected = closed_form([w.T for w in weights], moments, 0.9).T
    assert (merged[name] - expected).norm() < 1e-4 * (expected - base).norm()
    purified = merge(_config(paths, "pave_task_arithmetic", ["none", "none"], weight=1.0,
                             rank_ratio=0.8), tmp_path / "pave")
    plain = merge(_config(paths, "task_arithmetic", ["none", "none"], weight=1.0),
                  tmp_path / "plain")
    position = "transformer.wpe.weight"
    assert not torch.equal(purified[name], plain[name])
    assert torch.equal(purified[position], plain[position])


def test_without_data_a_vision_language_models_layers_are_known(tmp_path, monkeypatch):
    """Its checkpoint, and mergekit, call them otherwise than its class."""
    text = transformers.MistralConfig(
        vocab_size=94, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=4, head_dim=8)
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    for name in ("base", "expert0", "expert1"):
        model = transformers.Mistral3ForConditionalGeneration(config)
        model.save_pretrained(tmp_path / name)
    raw = {"merge_method": "regmean", "base_model": str(tmp_path / "base"), "dtype": "float32",
           "models": [{"model": str(tmp_path / f"expert{i}")} for i in range(2)],
           "parameters": {"calibration_dataset": "none"}}
    states = []
    real = run_merge.open_state
    monkeypatch.setattr(run_merge, "open_state", lambda *a: states.append(real(*a)) or states[-1])
    merged = merge(raw, tmp_path / "out")
    solved = states[0].counts["purified"]
    layers = [n for n in merged if n.startswith("language_model.model.layers") and "proj" in n]
    assert len(layers) == 14 and solved >= set(layers)
    assert any("vision_tower" in name for name in solved)
    assert "language_model.lm_head.weight" not in solved


def test_it_says_what_is_missing(families, texts, tmp_path):
    paths = families("llama")
    config = _config(paths, "regmean", texts)
    del config["models"][1]["parameters"]["calibration_dataset"]
    with pytest.raises(PaveError, match="has no calibration data.*none` or `self`"):
        merge(config, tmp_path / "out")
    config = _config(paths, "regmean", texts, reduce_non_diagonal_ratio=1.5)
    with pytest.raises(PaveError, match="reduce_non_diagonal_ratio.*must be between 0 and 1"):
        merge(config, tmp_path / "out")
    with pytest.raises(PaveError, match="models: every weight is 0"):
        merge(_config(paths, "regmean", texts, weight=0.0), tmp_path / "out")


@pytest.mark.parametrize("method", ["regmean", "pave_regmean", "tsv_regmean"])
def test_where_every_weight_is_zero_the_base_stays(families, texts, tmp_path, method):
    paths = families("llama")
    some = [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]
    merged = merge(_config(paths, method, texts, weight=some), tmp_path / "out")
    base = tensors_of(paths["base"])
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert not any("mlp" in name for name in changed)
    assert sum("self_attn" in name for name in changed) == 8


def test_in_memory_it_needs_a_store():
    base, expert = torch.randn(2, 4, 8)
    with pytest.raises(PaveError, match="has no covariances"):
        merge_tensors([base, expert], method="regmean", base_index=0)


def test_half_of_it_and_half_of_tsv_merge(families, texts, tmp_path):
    """`tsv_regmean` is the mean of what both methods give, and each of them at its ends."""
    paths = families("llama")
    merged = {
        name: merge(_config(paths, method, texts, **shared), tmp_path / name)
        for name, method, shared in (
            ("half", "tsv_regmean", {"averaging": 0.5}),
            ("scaled", "tsv_regmean", {"averaging": 0.5, "lambda": 2.0}),
            ("all", "tsv_regmean", {"balance": 1.0}),
            ("none", "tsv_regmean", {"balance": 0.0, "averaging": 1.0, "flattening": 0.0}),
            ("tsv", "tsv_m", {}),
            ("regmean", "regmean", {}),
            ("half regmean", "regmean", {"averaging": 0.5, "flattening": 0.5}),
        )
    }
    base = tensors_of(paths["base"])
    for name in base:
        tsv_, reg, half = (merged[k][name] for k in ("tsv", "half regmean", "half"))
        assert torch.allclose(merged["all"][name], tsv_, atol=1e-5)
        if "proj" in name:
            assert torch.allclose(half, (tsv_ + reg) / 2, atol=1e-5)
            assert torch.allclose(merged["none"][name], merged["regmean"][name], atol=1e-5)
            assert torch.allclose(merged["scaled"][name] - base[name], 2 * (half - base[name]),
                                  atol=1e-5)
        else:
            assert torch.equal(half, tsv_)


@pytest.mark.parametrize("method", ["regmean", "pave_regmean", "tsv_regmean"])
@pytest.mark.parametrize("averaging", [0.0, 0.5, 1.0])
def test_what_nobody_changed_stays_without_data(tmp_path, method, averaging):
    """Its covariance, estimated from nothing, is empty."""
    paths = make_family(tmp_path, "llama")
    base = tensors_of(paths["base"])
    frozen, half = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    for expert, names in (("expert0", (frozen, half)), ("expert1", (frozen,))):
        state = tensors_of(paths[expert]) | {name: base[name].clone() for name in names}
        save_file(state, paths[expert] / "model.safetensors", metadata={"format": "pt"})
    config = _config(paths, method, ["none", "none"], averaging=averaging)
    merged = merge(config, tmp_path / "out")
    assert torch.equal(merged[frozen], base[frozen])
    assert merged[half].isfinite().all() and not torch.equal(merged[half], base[half])


def test_the_ablations_rank_by_something_else_and_solve_alike(families, texts, tmp_path):
    """`subspace` is for purification; the solution needs the covariances whatever it says."""
    paths = families("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    found = {
        subspace: merge(_config(paths, "pave_regmean", texts, rank_ratio=0.8, subspace=subspace,
                                rank_allocation="uniform"), tmp_path / subspace)[name]
        for subspace in ("covariance", "svd")
    }
    covariances = [reference(paths[f"expert{i}"], "llama", spec_of(texts[i]))[name]
                   for i in range(2)]
    weights = []
    for i in range(2):
        u, s, v = torch.linalg.svd(tensors_of(paths[f"expert{i}"])[name].double(), False)
        weights.append((u[:, :26] * s[:26]) @ v[:26])  # 0.8 of 32
    expected = closed_form(weights, covariances, 0.9)
    base = tensors_of(paths["base"])[name]
    assert (found["svd"] - expected).norm() < 1e-4 * (expected - base).norm()
    assert not torch.allclose(found["svd"], found["covariance"], atol=1e-5)


@pytest.mark.parametrize("method", ["regmean", "tsv_regmean"])
def test_mergekits_loading_options_are_taken_over(families, texts, tmp_path, method):
    paths = families("llama")
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["base"])
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    config = _config({**paths, "expert0": f"{paths['base']}+{tmp_path / 'adapter'}"}, method, texts)
    merged = merge(config, tmp_path / "out", lora_merge_cache=str(tmp_path / "loras"))
    assert all(tensor.isfinite().all() for tensor in merged.values())


def test_names_of_an_older_transformers(tmp_path, capfd):
    paths = make_family(tmp_path, "vit", save_original_format=True)
    merge(_config(paths, "regmean", ["none", "none"]), tmp_path / "out", quiet=False)
    assert "12 tensors merged by their covariances" in capfd.readouterr().err


def test_a_model_of_weight_zero_does_not_count(texts, tmp_path):
    """`averaging` of `tsv_regmean`, when not given, is one over the number of other models."""
    paths = make_family(tmp_path, "llama", experts=3)
    given = _config(paths, "tsv_regmean", texts, balance=0.0, averaging=1.0)
    absent = {"model": str(paths["expert2"]),
              "parameters": {"weight": 0.0, "calibration_dataset": str(texts[0])}}
    config = _config(paths, "tsv_regmean", texts, balance=0.0)
    config["models"].append(absent)
    found, expected = merge(config, tmp_path / "a"), merge(given, tmp_path / "b")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(found[name], expected[name], atol=1e-6)


def test_the_end_of_a_merge_says_what_was_done(families, tmp_path, capsys):
    merge(_config(families("llama"), "regmean", ["none", "none"]), tmp_path / "out", quiet=False)
    assert "14 tensors merged by their covariances, 7 merged plainly" in capsys.readouterr().err


def test_numbers_that_are_none_are_named():
    base, expert = torch.randn(2, 4, 8)
    expert[1, 1] = torch.nan
    with pytest.raises(PaveError, match="holds NaN or Inf"):
        merge_tensors([base, expert], method="regmean", base_index=0,
                      parameters={"calibration_dataset": "none"})


def test_more_layers_than_the_model_has(families, tmp_path):
    """Without data a layer is known by its name alone, and slices may number it anew."""
    paths = families("llama")
    config = _config(paths, "pave_task_arithmetic", ["none", "none"], weight=0.5, rank_ratio=0.8)
    models = config.pop("models")
    parts = [{"model": str(paths["base"])}, *models]
    config["slices"] = [
        {"sources": [{**part, "layer_range": [0, 2]} for part in parts]} for _ in range(2)]
    merged = merge(config, tmp_path / "out")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.allclose(merged[name.format(3)], merged[name.format(1)])


def test_fused_experts_are_named_without_data_too(tmp_path, caplog):
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=94, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        hidden_size=32, intermediate_size=48, num_local_experts=4))
    paths = {}
    for name in ("base", "expert0", "expert1"):
        paths[name] = tmp_path / name
        model.save_pretrained(paths[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    merge(_config(paths, "tsv_regmean", ["none", "none"]), tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "fused experts" in record.message]
    assert len(said) == 2 and said[0].startswith("expert0: 2 weights cannot be purified")
