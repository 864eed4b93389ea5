"""Task singular vectors against the paper's formulas, and merges through mergekit's own path."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import config_of, make_family, merge, tensors_of
from mergekit.merge_methods import TensorGroup, get, merge_tensors
from safetensors.torch import save_file

import mergekit_pave
from mergekit_pave.algebra.numeric import rounding
from mergekit_pave.algebra.tsv import (
    Factors,
    factors,
    interference,
    kept_rank,
    merged_delta,
    polar,
    singular_task_interference,
)
from mergekit_pave.errors import PaveError

mergekit_pave.register()


def papers_merge(deltas: list[np.ndarray], k: int) -> np.ndarray:
    """Algorithm 1 in float64: truncate, concatenate, the Procrustes solution of both sides."""
    us, ss, vs = [], [], []
    for delta in deltas:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :k])
        ss.append(s[:k])
        vs.append(vt[:k])
    p, _, qt = np.linalg.svd(np.concatenate(us, 1), full_matrices=False)
    r, _, tt = np.linalg.svd(np.concatenate(vs, 0), full_matrices=False)
    return (p @ qt) @ np.diag(np.concatenate(ss)) @ (r @ tt)


def papers_interference(deltas: list[np.ndarray], k: int) -> float:
    us, ss, vs = zip(*(np.linalg.svd(delta, full_matrices=False) for delta in deltas),
                     strict=True)
    u = np.concatenate([x[:, :k] for x in us], 1)
    v = np.concatenate([x[:k] for x in vs], 0).T
    s = np.diag(np.concatenate([x[:k] for x in ss]))
    eye = np.eye(len(s))
    return np.abs((u.T @ u - eye) @ s @ (v.T @ v - eye)).sum()


def draw(*shape, seed=0, scale=0.05) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(draw(rows, columns, seed=seed).double()).Q


def ours(base: torch.Tensor, models: list[torch.Tensor], *, vocabulary_axis=None, name="w",
         **parameters) -> torch.Tensor:
    group = TensorGroup.from_tensors([base, *models], base_index=0, name=name,
                                     vocabulary_axis=vocabulary_axis)
    return get("tsv_m")((group,), parameters=parameters)[0]


def family(*shape, tasks=3, dtype=torch.float32, scale=0.02):
    """A base and its fine-tunes, and their deltas as the reference wants them."""
    base = draw(*shape, seed=99, scale=1.0).to(dtype)
    models = [(base.float() + draw(*shape, seed=i, scale=scale)).to(dtype) for i in range(tasks)]
    return base, models, [(m.double() - base.double()).numpy() for m in models]


def off(found: torch.Tensor, base: torch.Tensor, delta: np.ndarray) -> float:
    """Relative error of a merged delta."""
    want = torch.from_numpy(delta)
    return ((found.double() - base.double() - want).norm() / want.norm()).item()


# --- algebra -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40), (64, 7)])
@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_the_merge_is_the_papers(shape, tasks):
    base, models, deltas = family(*shape, tasks=tasks)
    want = papers_merge(deltas, min(shape) // tasks)
    found = merged_delta([factors(torch.from_numpy(d), min(shape) // tasks)
                              for d in deltas])
    assert np.linalg.norm(found.numpy() - want) <= 1e-8 * np.linalg.norm(want)
    # A float32 weight of size 1 itself is only exact to 1e-7, its delta of 0.02 to 1e-5.
    merged = ours(base.double(), [m.double() for m in models])
    assert off(merged, base, want) <= 1e-8
    assert (ours(base, models) - merged).abs().max() <= 1e-6


@pytest.mark.parametrize("last", [0.9, 1e-2, 1e-4])
def test_a_steep_spectrum_costs_no_digits_that_matter(last):
    """`s_k` from almost `s_1` to just above what counts as rounding."""
    deltas = []
    for i in range(4):
        s = torch.logspace(0, 4 * np.log10(last), 48, dtype=torch.float64)
        deltas.append((orthonormal(64, 48, i) * s @ orthonormal(48, 48, 10 + i).T).numpy())
    want = papers_merge(deltas, 12)
    found = merged_delta([factors(torch.from_numpy(d), 12) for d in deltas])
    assert np.linalg.norm(found.numpy() - want) <= 1e-8 * np.linalg.norm(want)


def test_orthogonal_tasks_are_added():
    u, v = orthonormal(12, 6, 0), orthonormal(10, 6, 1)
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    deltas = [u[:, :3] * s @ v[:, :3].T, 2 * u[:, 3:] * s @ v[:, 3:].T]
    found = merged_delta([factors(d, 3) for d in deltas])
    torch.testing.assert_close(found, sum(deltas))


def test_the_order_of_the_tasks_does_not_matter():
    base, models, _ = family(20, 12)
    torch.testing.assert_close(ours(base, models), ours(base, models[::-1]))


def test_one_task_alone_comes_back():
    base, models, deltas = family(20, 12, tasks=1)
    torch.testing.assert_close(ours(base, models), models[0])
    torch.testing.assert_close(ours(base, models, rank_fraction=1.0), models[0])
    u, s, v = np.linalg.svd(deltas[0], full_matrices=False)
    half = ours(base.double(), [models[0].double()], rank_fraction=0.5)
    assert off(half, base, u[:, :6] * s[:6] @ v[:6]) < 1e-9


def test_all_directions_of_all_tasks():
    """More columns than rows: the polar factor of a wide stack has orthonormal rows."""
    base, models, deltas = family(12, 12, tasks=3)
    found = ours(base.double(), [m.double() for m in models], rank_fraction=1.0)
    assert off(found, base, papers_merge(deltas, 12)) < 1e-9


def test_more_tasks_than_rank():
    """A head of two rows and eight tasks: a share of 0 would make the merge the base."""
    base, models, deltas = family(2, 30, tasks=8)
    found = ours(base.double(), [m.double() for m in models])
    assert off(found, base, papers_merge(deltas, 1)) < 1e-9
    # No direction of the merge is stronger than the sum of what went into it.
    assert np.linalg.norm(found.numpy() - base.double().numpy(), 2) <= sum(
        np.linalg.norm(d, 2) for d in deltas)


def test_polar_of_dependent_columns():
    x = orthonormal(9, 3, 0)
    twice = polar(torch.cat([x, x], 1))
    torch.testing.assert_close(twice, torch.cat([x, x], 1) / 2**0.5)
    spectrum = torch.linalg.svdvals(polar(torch.cat([x, x @ x[:3, :3], draw(9, 2)], 1)))
    assert all(min(abs(s), abs(s - 1)) < 1e-9 for s in spectrum.tolist())


@pytest.mark.parametrize("second", [1.0, 3.0, 1 + 1e-9])
def test_tasks_with_the_same_directions_are_averaged(second):
    delta = orthonormal(16, 4, 0) * torch.tensor([4.0, 3, 2, 1]) @ orthonormal(12, 4, 1).T
    found = merged_delta([factors(scale * delta, 4) for scale in (1.0, second)])
    torch.testing.assert_close(found, (1 + second) / 2 * delta)


def test_what_is_only_rounding_turns_nothing_aside():
    """A merged adapter has rank 2; the rest of its delta is the rounding of the sum."""
    base = draw(48, 32, seed=9, scale=0.5)
    deltas = [draw(48, 2, seed=i) @ draw(2, 32, seed=10 + i, scale=1.0) for i in range(2)]
    exact = papers_merge([d.double().numpy() for d in deltas], 2)
    rounded = [base + d for d in deltas]
    part = factors(rounded[0] - base, 16)
    assert len(part.s) == 2 and part.u.shape == (48, 2) and part.v.shape == (32, 2)
    assert off(ours(base, rounded), base, exact) < 1e-5


def _in_float32(weight, deltas):
    return [(weight + delta.float()).double() - weight.double() for delta in deltas]


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_rounding_of_the_weights_is_no_direction(size):
    """Truncated task vectors, and adapters, stored in float32: small beside their weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 192, generator=generator)
    deltas = []
    for rank in (20, 48, 76):
        part = torch.randn(192, rank, generator=generator).double() @ torch.randn(
            rank, 192, generator=generator).double()
        deltas.append(part / part.norm() * weight.norm() * size)
    expected = merged_delta([factors(delta, 64) for delta in deltas])
    parts = [factors(delta, 64, rounding(weight)) for delta in _in_float32(weight, deltas)]
    assert [len(part.s) for part in parts] == [20, 48, 64]
    assert (merged_delta(parts) - expected).norm() < 1e-5 / size * expected.norm()
    models = [(weight.double() + delta).float() for delta in deltas]
    found = ours(weight.double(), [m.double() for m in models]) - weight.double()
    assert (found - expected).norm() < 2e-5 / size * expected.norm()


@pytest.mark.parametrize("size", [1e-1, 1e-2])
def test_directions_that_tasks_share_stay_shared_in_float32(size):
    """Adapters with one frozen A: nothing may leave its row space."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator)
    a = torch.randn(16, 128, generator=generator).double()
    deltas = [torch.randn(128, 16, generator=generator).double() @ a for _ in range(2)]
    deltas = [delta / delta.norm() * weight.norm() * size for delta in deltas]
    expected = merged_delta([factors(delta, 16) for delta in deltas])
    found = merged_delta([
        factors(delta, 64, rounding(weight)) for delta in _in_float32(weight, deltas)])
    assert (found - found @ torch.linalg.pinv(a) @ a).norm() < 1e-3 * found.norm()
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("shape", [(64, 64), (48, 32), (32, 48)])
def test_a_change_of_one_rounding_is_none(shape):
    base = draw(*shape)
    nudged = base.clone()
    nudged[3, 4] = torch.nextafter(nudged[3, 4], torch.tensor(9.0))
    assert not torch.equal(base, nudged)
    assert torch.equal(ours(base, [nudged]), base)
    changed = base + draw(*shape, seed=1)
    alone = ours(base, [changed], rank_fraction=0.5)
    torch.testing.assert_close(ours(base, [nudged, changed], rank_fraction=0.5), alone)


@pytest.mark.parametrize("method", ["tsv_m", "regmean", "tsv_regmean", "pave_regmean",
                                    "pave_tsv_m"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_broken_weights_outside_linear_layers_are_named(tmp_path, method, name):
    paths = make_family(tmp_path, "llama")
    state = tensors_of(paths["expert1"])
    state[name].view(-1)[5] = float("nan")
    save_file(state, paths["expert1"] / "model.safetensors", metadata={"format": "pt"})
    shared = {} if method == "tsv_m" else {"calibration_dataset": "none"}
    config = {"merge_method": method, "base_model": str(paths["base"]), "dtype": "float32",
              "models": [{"model": str(paths[f"expert{i}"])} for i in range(2)],
              "parameters": shared}
    with pytest.raises(PaveError, match=f"{name} of .*expert1 holds NaN or Inf"):
        merge(config, tmp_path / "out")


def test_factors_are_the_leading_triples():
    for shape in ((9, 14), (14, 9)):
        delta = draw(*shape)
        found = factors(delta, 4)
        u, s, vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)
        assert np.allclose(found.s, s[:4])
        assert np.allclose((found.u * found.s @ found.v.T).numpy(), u[:, :4] * s[:4] @ vt[:4])
        torch.testing.assert_close(found.u.T @ found.u, torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(found.v.T @ found.v, torch.eye(4, dtype=torch.float64))
    nothing = factors(torch.zeros(5, 3), 2)
    assert nothing.u.shape == (5, 0) and nothing.v.shape == (3, 0) and not len(nothing.s)


@pytest.mark.parametrize(("shape", "tasks", "fraction", "count"), [
    ((768, 768), 8, None, 96), ((3072, 768), 8, None, 96), ((768, 768), 5, None, 153),
    ((49, 49), 49, None, 1), ((49, 60), 1, 1 / 49, 1), ((2, 768), 8, None, 1),
    ((768, 768), 8, 0.5, 384), ((10, 10), 3, 0.29, 2), ((10, 10), 3, 0.01, 1),
    ((768, 768), 3, 0.1 + 0.2, 230), ((10, 10), 1, 0.7, 7),
])
def test_kept_rank(shape, tasks, fraction, count):
    assert kept_rank(shape, tasks, fraction) == count


# --- interference --------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "tasks", "fraction", "k"), [
    ((6, 5), 2, None, 2), ((5, 9), 3, None, 1), ((12, 12), 3, 0.5, 6), ((4, 4), 2, 1.0, 4),
])
def test_interference_is_the_published_formula(shape, tasks, fraction, k):
    deltas = [draw(*shape, seed=i) for i in range(tasks)]
    want = papers_interference([d.double().numpy() for d in deltas], k)
    assert singular_task_interference(deltas, fraction) == pytest.approx(want, rel=1e-9)
    value, relative = interference([factors(d, k) for d in deltas])
    total = sum(np.linalg.svd(d.double(), compute_uv=False)[:k].sum() for d in deltas)
    assert (value, relative) == pytest.approx((want, want / total), rel=1e-6)


def test_orthogonal_tasks_do_not_interfere():
    u, v = orthonormal(8, 4, 2), orthonormal(7, 4, 3)
    s = torch.tensor([2.0, 1.0], dtype=torch.float64)
    parts = [Factors(u[:, i:i + 2], s, v[:, i:i + 2]) for i in (0, 2)]
    assert interference(parts)[0] == pytest.approx(0, abs=1e-12)
    assert interference([parts[0], parts[0]])[0] > 1
    assert singular_task_interference([p.u * s @ p.v.T for p in parts], 0.3) < 1e-9


# --- the method ----------------------------------------------------------------------------


def test_weight_and_lambda_scale():
    base, models, deltas = family(16, 12, dtype=torch.float64)
    found = ours(base, models, weight=[0.5, 2.0, 1.0], **{"lambda": 0.7, "lambda_other": 9.0})
    want = papers_merge([w * d for w, d in zip((0.5, 2.0, 1.0), deltas, strict=True)], 4)
    assert off(found, base, 0.7 * want) < 1e-9


@pytest.mark.parametrize(("shape", "axis"), [
    ((12,), None), ((), None), ((4, 3, 2, 2), None), ((3, 5, 4), None), ((20, 12), 0),
    ((12, 20), 1),
])
def test_other_tensors_get_the_mean(shape, axis):
    base, models, deltas = family(*shape, dtype=torch.float64)
    found = ours(base, models, vocabulary_axis=axis, weight=[1.0, 2.0, 1.0], rank_fraction=0.1,
                 **{"lambda": 9.0, "lambda_other": 0.5})
    want = 0.5 * (deltas[0] + 2 * deltas[1] + deltas[2]) / 3
    torch.testing.assert_close(found, base + torch.as_tensor(want))


@pytest.mark.parametrize("shape", [(12, 16), (12,)])
def test_a_model_of_weight_zero_is_absent(shape):
    base, models, _ = family(*shape)
    two = ours(base, models[:2])
    assert torch.equal(ours(base, models, weight=[1.0, 1.0, 0.0]), two)
    assert torch.equal(ours(base, models, weight=0.0), base)
    if len(shape) == 2:  # a zero delta takes no share of the rank either
        assert torch.equal(ours(base, [*models[:2], base]), two)
        assert torch.equal(ours(base, [base, base.clone()]), base)
    else:
        torch.testing.assert_close(ours(base, [*models[:2], base]), base + (two - base) * 2 / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_once(dtype):
    base, models, deltas = family(24, 16, dtype=dtype, scale=0.1)
    found = ours(base, models)
    want = base.double() + torch.from_numpy(papers_merge(deltas, 5))
    assert found.dtype == dtype and torch.equal(found, want.to(dtype))
    bias = ours(base[:, 0], [m[:, 0] for m in models])
    mean = base[:, 0].double() + torch.from_numpy(np.mean([d[:, 0] for d in deltas], axis=0))
    assert bias.dtype == dtype and torch.equal(bias, mean.to(dtype))


def test_inputs_stay_as_they_are():
    base, models, _ = family(12, 8)
    for one, others in ((base, models), (base[0], [m[0] for m in models])):
        copies = [t.clone() for t in (one, *others)]
        ours(one, others, weight=0.3)
        assert all(torch.equal(a, b) for a, b in zip(copies, (one, *others), strict=True))


def test_unusable_numbers_are_named():
    base, models, _ = family(12, 8)
    models[1][3, 3] = torch.nan
    with pytest.raises(PaveError, match="layer.weight of 2 holds NaN or Inf"):
        ours(base, models, name="layer.weight")


@pytest.mark.parametrize("value", [0, -0.1, 1.5, "x", float("nan"), True])
def test_bad_fractions_are_refused(value):
    base, models, _ = family(6, 4)
    with pytest.raises(PaveError, match="rank_fraction must be .*; got"):
        ours(base, models, rank_fraction=value)


def test_a_base_is_required():
    _, models, _ = family(6, 4)
    with pytest.raises(ValueError, match="requires a base"):
        merge_tensors(models, "tsv_m")
    assert get("pave_tsv_m").inner is get("tsv_m")


# --- through mergekit ----------------------------------------------------------------------


def recipe(paths: dict, **shared) -> dict:
    """Without any parameter of a model: `weight` has a default."""
    config = config_of(paths, "tsv_m", [], **shared)
    for model in config["models"]:
        del model["parameters"]
    return config


def by_hand(paths: dict, merged: dict, k: int, scale: float, other: float) -> None:
    """Every tensor of a merge of two experts against the reference."""
    base = tensors_of(paths["base"])
    experts = [tensors_of(paths[f"expert{i}"]) for i in range(2)]
    for name, tensor in merged.items():
        deltas = [(e[name].double() - base[name].double()).numpy() for e in experts]
        averaged = tensor.ndim != 2 or "embed_tokens" in name or "lm_head" in name
        want = other * np.mean(deltas, axis=0) if averaged else scale * papers_merge(
            deltas, min(tensor.shape) // k)
        assert np.allclose(tensor.double() - base[name].double(), want, atol=1e-5), name


def test_the_stock_path(families, tmp_path):
    paths = families("llama")
    merged = merge(recipe(paths), tmp_path / "out")
    by_hand(paths, merged, 2, 1.0, 1.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())


def test_filters_reach_the_parameters(families, tmp_path):
    paths = families("llama")
    config = recipe(paths, **{"lambda": 0.5, "lambda_other": [
        {"filter": "norm", "value": 0.0}, {"value": 1.0}]})
    merged, base = merge(config, tmp_path / "out"), tensors_of(paths["base"])
    for name in merged:
        assert torch.equal(merged[name], base[name]) == ("norm" in name), name


def test_half_precision_through_mergekit(tmp_path):
    paths = make_family(tmp_path, "llama", dtype=torch.bfloat16)
    config = recipe(paths)
    wide = merge({**config, "out_dtype": "bfloat16"}, tmp_path / "wide")
    half = merge({**config, "dtype": "bfloat16"}, tmp_path / "half")
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, wide[n]) for n, t in half.items())


def test_the_purified_twin(families, texts, tmp_path):
    """`pave_tsv_m` is `tsv_m` of models purified beforehand."""
    paths = families("roberta")
    shared = {"rank_ratio": 0.8, "rank_allocation": "uniform"}
    config = config_of(paths, "pave_tsv_m", texts, **shared)
    for model in config["models"]:
        del model["parameters"]["density"]
    found = merge(config, tmp_path / "out")
    purified = {"base": paths["base"]}
    for i in range(2):
        alone = config_of({"base": paths["base"], "expert0": paths[f"expert{i}"]},
                          "pave_task_arithmetic", [texts[i]], experts=1, **shared)
        alone["models"][0]["parameters"]["weight"] = 1.0
        purified[f"expert{i}"] = tmp_path / f"purified{i}"
        merge(alone, purified[f"expert{i}"])

    def plain(models: dict) -> dict:
        config = recipe(models)
        for model in config["models"]:
            model["parameters"] = {"weight": 0.7}
        return config

    want = merge(plain(purified), tmp_path / "want")
    plain = merge(plain(paths), tmp_path / "plain")
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    assert all(torch.allclose(found[n], want[n], atol=1e-4) for n in want)
    assert (found[name] - plain[name]).norm() > 0.05 * plain[name].norm()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.state_dict()[name], found[name])


def test_importing_it_first_registers_it():
    """Not half imported, when the start-up hook asks for it in the middle of its import."""
    code = ("import mergekit_pave.methods.tsv, mergekit.merge_methods as m; "
            "print(m.get('tsv_m').spec.name, m.get('pave_tsv_m').spec.name)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == ["tsv_m", "pave_tsv_m"], found.stderr
    assert "could not attach" not in found.stderr
