"""Input that cannot be honoured: one sentence, nothing heavy before it, nothing half-made after."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from helpers import recipe, write_tokenizer
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergekit_pave import cli, plugin
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import ModelSource
from mergekit_pave.recipe.parameters import CalibrationSpec
from mergekit_pave.storage.covariances import MANIFEST, CovarianceStore


def merge(raw: dict, out: Path, **options) -> dict[str, torch.Tensor]:
    run_merge(
        MergeConfiguration.model_validate(raw), str(out),
        MergeOptions(quiet=True, copy_tokenizer=False, **options), yaml.safe_dump(raw),
    )
    return tensors(out)


def refused(raw: dict, out: Path, **options) -> str:
    """The sentence with which a merge ends; what it leaves behind does not look finished."""
    with pytest.raises(PaveError) as caught:
        merge(raw, out, **options)
    assert not (out / "config.json").exists()
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?", ")"))
    return text


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def rewrite(source: Path, target: Path, edit) -> Path:
    """A copy of a checkpoint with `edit(tensors)` applied to its tensors."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    edit(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def calibrated(model: Path, data: Path, folder: Path, samples: int = 20) -> Path:
    source = ModelSource(str(model), model.name, str(model))
    calibrate_to(source, CalibrationSpec(str(data), num_samples=samples), folder, Resources())
    return folder


@pytest.fixture(scope="session")
def stores(families, texts, tmp_path_factory) -> list[Path]:
    """A covariance store of each fine-tune of the llama family."""
    folder = tmp_path_factory.mktemp("stores")
    return [calibrated(families("llama")[f"expert{i}"], texts[i], folder / str(i))
            for i in range(2)]


@pytest.fixture
def good(families, texts) -> dict:
    return recipe(families("llama"), texts)


@pytest.fixture
def published(families, texts, stores, tmp_path) -> dict:
    """A merge that takes everything from stores, the first of them to be tampered with."""
    raw = recipe(families("llama"), texts)
    shutil.copytree(stores[0], tmp_path / "store")
    for model, store in zip(raw["models"], [tmp_path / "store", stores[1]], strict=True):
        del model["parameters"]["calibration_dataset"]
        model["parameters"]["covariance"] = str(store)
    return raw


@pytest.fixture
def untouched(monkeypatch):
    """Fails the test when mergekit begins with the merge."""

    def refuse(*args, **kwargs):
        raise AssertionError("the merge was begun")

    monkeypatch.setattr("mergekit.merge.get_architecture_info", refuse)
    monkeypatch.setattr("mergekit_pave.calibration.run.load_model", refuse)


# --- what `check` finds, the stock command refuses ------------------------------------------

EARLY = {
    "method": (lambda raw: raw.update(merge_method="pave-ties"), "did you mean pave_ties?"),
    "base": (lambda raw: raw.pop("base_model"), "`base_model: NAME`"),
    "key": (lambda raw: raw.update(nonsense=1), "unknown key 'nonsense'"),
    "dropped": (lambda raw: raw["models"][0]["parameters"].update(wieght=1), "mean weight?"),
    "list": (lambda raw: raw["parameters"].update(covariance=["a", "b"]), "single value"),
    "ratio": (lambda raw: raw["parameters"].update(rank_ratio=4000), "at most 1"),
    "data": (lambda raw: raw["parameters"].update(text_column="question"), "'question'"),
    "store": (lambda raw: raw["parameters"].update(covariance="/nowhere"), "No covariance store"),
    "model": (lambda raw: raw["models"][1].update(model="/nowhere"), "no model folder /nowhere"),
}


@pytest.mark.parametrize("case", EARLY)
def test_stock_command_refuses_in_one_line(good, tmp_path, untouched, case):
    break_it, word = EARLY[case]
    break_it(good)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(good))
    command = [str(tmp_path / "merge.yml"), str(tmp_path / "out")]
    result = CliRunner().invoke(mergekit_yaml, command)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    assert line.startswith("Error: ") and word in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_duplicate_key_in_the_stock_command(good, tmp_path, untouched):
    text = yaml.safe_dump(good).replace("rank_ratio: 0.9", "rank_ratio: 0.9\n  rank_ratio: 0.8")
    (tmp_path / "merge.yml").write_text(text)
    command = [str(tmp_path / "merge.yml"), str(tmp_path / "out")]
    result = CliRunner().invoke(mergekit_yaml, command)
    assert result.exit_code == 1 and "'rank_ratio' is given twice" in result.output


def test_in_process_merge_raises(good, tmp_path, untouched):
    good["parameters"]["rank_ratio"] = 7
    assert "at most 1" in refused(good, tmp_path / "out")


@pytest.mark.parametrize("name", ["tie", "linear-", "slurp"])
def test_unknown_methods_of_others_are_left_to_mergekit(good, tmp_path, name):
    good["merge_method"] = name
    with pytest.raises(RuntimeError, match="Unimplemented merge method"):
        merge(good, tmp_path / "out")


def stock(raw: dict, tmp_path: Path) -> subprocess.CompletedProcess:
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(raw))
    return subprocess.run(
        [Path(sys.executable).with_name("mergekit-yaml"), tmp_path / "merge.yml",
         tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )


def test_installed_command_with_a_misspelt_method(good, tmp_path):
    result = stock({**good, "merge_method": "pave_tie", "base_model": "nobody/nothing"}, tmp_path)
    assert result.returncode == 1
    assert "Error: merge_method: 'pave_tie'" in result.stderr
    assert "did you mean pave_ties?" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_installed_command_stops_in_the_middle_of_a_merge(good, tmp_path):
    good["models"][0]["parameters"]["weight"] = 1e300
    good["parameters"]["num_calibration_samples"] = 2
    result = stock(good, tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "Error: The merge of " in result.stderr and "NaN or Inf" in result.stderr
    assert not (tmp_path / "out" / "config.json").exists()


# --- data, end to end ----------------------------------------------------------------------


def test_data_without_a_usable_row(good, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": null}\n{"text": "  "}\n')
    good["models"][1]["parameters"]["calibration_dataset"] = str(tmp_path / "d.jsonl")
    assert "no usable row" in refused(good, tmp_path / "out")


def test_few_tokens_work_and_warn(good, tmp_path, caplog):
    (tmp_path / "d.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    good["parameters"]["calibration_dataset"] = str(tmp_path / "d.jsonl")
    for model in good["models"]:
        del model["parameters"]["calibration_dataset"]
    assert all(t.isfinite().all() for t in merge(good, tmp_path / "out").values())
    assert "covariances come from fewer tokens than features" in caplog.text
    assert "1 usable rows, fewer than num_calibration_samples 20" in caplog.text


# --- stores --------------------------------------------------------------------------------


def test_stores_alone_suffice(published, tmp_path):
    assert merge(published, tmp_path / "out")
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


def test_store_of_another_model(published, stores, tmp_path, untouched):
    published["models"][0]["parameters"]["covariance"] = str(stores[1])
    text = refused(published, tmp_path / "out")
    assert "other weights than those of expert0" in text and "models[0]" in text


def test_store_of_another_architecture(published, families, texts, tmp_path):
    other = calibrated(families("gpt2")["base"], texts[0], tmp_path / "gpt2")
    published["models"][0]["parameters"]["covariance"] = str(other)
    text = refused(published, tmp_path / "out")
    assert "expert0" in text and "gpt2" in text and "recalibrate" in text


@pytest.mark.parametrize("layer", [0, 1])
def test_store_of_weights_that_have_changed(published, families, tmp_path, layer):
    """In the last layer only the merge itself notices."""

    def edit(weights):
        weights[f"model.layers.{layer}.mlp.up_proj.weight"][0, 0] += 1

    newer = rewrite(families("llama")["expert0"], tmp_path / "newer", edit)
    published["models"][0]["model"] = str(newer)
    text = refused(published, tmp_path / "out")
    assert "newer" in text and f"layers.{layer}.mlp.up_proj" in text and "recalibrate" in text


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": lambda s: _flip(next(s.glob("covariance-*")), -10),
    "cut short": lambda s: os.truncate(next(s.glob("covariance-*")), 500),
    "file gone": lambda s: next(s.glob("covariance-*")).unlink(),
    "fingerprints gone": lambda s: (s / "fingerprints.safetensors").unlink(),
    "fingerprints cut": lambda s: os.truncate(s / "fingerprints.safetensors", 20),
    "key missing": lambda s: _edit_manifest(s, lambda m: m.pop("weights")),
    "weight missing": lambda s: _edit_manifest(s, lambda m: m["weights"].update(
        ghost=dict(site="x", shape=[2, 2], transposed=False, dtype="float32"))),
}


def _edit_manifest(store: Path, edit) -> None:
    manifest = json.loads((store / MANIFEST).read_text())
    edit(manifest)
    (store / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_store(published, tmp_path, damage):
    DAMAGE[damage](tmp_path / "store")
    text = refused(published, tmp_path / "out")
    assert "is damaged" in text and "delete the folder and recalibrate" in text


def test_store_of_a_later_version(published, tmp_path, untouched):
    _edit_manifest(tmp_path / "store", lambda m: m.update(format=99))
    assert "format 99" in refused(published, tmp_path / "out")


def test_unfinished_store(published, tmp_path, untouched):
    (tmp_path / "store" / MANIFEST).unlink()
    assert "it has no manifest.json" in refused(published, tmp_path / "out")


# --- numbers -------------------------------------------------------------------------------


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
    merged, base = merge(published, tmp_path / "out"), tensors(same)
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
    own = [tensors(paths[f"expert{i}"])[name] for i in range(2)]
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
    own = [tensors(paths[f"expert{i}"]) for i in range(2)]
    plain = {name: (own[0][name] + own[1][name]) / 2 for name in own[0] if name in merged}
    changed = {n for n in plain if not torch.allclose(merged[n], plain[n], atol=1e-6)}
    assert not [name for name in plain if ".experts." in name]  # mergekit fuses them too
    assert {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"} == changed


# --- the disk ------------------------------------------------------------------------------


def test_a_home_that_nobody_has(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", "~nobody-of-that-name/cache")
    good["models"][0]["parameters"]["covariance"] = "~nobody-of-that-name/store"
    assert "~nobody-of-that-name/store" in refused(good, tmp_path / "out")


def test_cache_that_cannot_be_made(good, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "file" / "cache"))
    text = refused(good, tmp_path / "out")
    assert "Cannot write to the folder" in text and "MERGEKIT_PAVE_CACHE" in text


def test_cache_that_cannot_be_written(good, tmp_path, monkeypatch):
    """Another user's folder: it is there, but no lock can be put into it."""

    class Denied:
        def __init__(self, path):
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("mergekit_pave.storage.files.FileLock", Denied)
    text = refused(good, tmp_path / "out")
    assert "Permission denied" in text and "MERGEKIT_PAVE_CACHE" in text


FULL = [OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device")]


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("files", [0, 2])
def test_disk_full(good, tmp_path, monkeypatch, error, files):
    """Whichever file is the one too many: windows first, then fingerprints."""
    written = []

    def save(tensors, path, **kwargs):
        if len(written) == files:
            Path(path).write_bytes(b"half")
            raise error
        written.append(path)
        return save_file(tensors, path, **kwargs)

    monkeypatch.setattr("mergekit_pave.storage.covariances.save_file", save)
    monkeypatch.setenv("MERGEKIT_PAVE_STATISTICS_MEMORY", "16000")
    good["parameters"]["num_calibration_samples"] = 4
    text = refused(good, tmp_path / "out")
    assert "No space left on device" in text and "Cannot write" in text
    left = [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert MANIFEST not in left and not [name for name in left if name.endswith(".tmp")]
    assert len([name for name in left if name.endswith(".safetensors")]) == files
    monkeypatch.undo()
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "cache"))
    assert merge(good, tmp_path / "out")


@pytest.mark.parametrize("name", [MANIFEST, "calibration.json"])
def test_disk_full_for_a_small_file(good, tmp_path, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr("mergekit_pave.storage.files.os.replace", full)
    text = refused(good, tmp_path / "out")
    assert name in text and "No space left on device" in text
    assert not list((tmp_path / "cache").rglob(MANIFEST))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


# --- the host ------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["0.1.4", "0.0.6.post1", "0.1.0rc1"])
def test_old_mergekit(monkeypatch, found):
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    with pytest.raises(PaveError) as caught:
        plugin.register()
    assert found in str(caught.value) and "0.1.5 or newer" in str(caught.value)
    assert "pip install --upgrade" in str(caught.value)
    with pytest.raises(PaveError, match="0.1.5 or newer"):
        plugin.attach(sys.modules["mergekit.merge"])
    result = CliRunner().invoke(cli.main, ["methods"])
    assert result.exit_code == 1 and "0.1.5 or newer" in result.stderr


@pytest.mark.parametrize("found", ["0.1.5", "0.1.6.dev0", "0.2.0"])
def test_new_mergekit(monkeypatch, found):
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    assert "pave_ties" in plugin.register()


def test_planning_twice_with_one_configuration(good, tmp_path):
    """mergekit rewrites the configuration while planning; a notebook runs it again."""
    config = MergeConfiguration.model_validate(good)
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    run_merge(config, str(tmp_path / "a"), options, yaml.safe_dump(good))
    run_merge(config, str(tmp_path / "b"), options, yaml.safe_dump(good))
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


