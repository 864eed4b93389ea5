"""Covariances against an independent computation, and what they must not depend on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from helpers import (
    CLASSES,
    make_family,
    mean_of,
    reference,
    source_of,
    spec_of,
    worst,
    write_texts,
    write_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from mergekit_pave.algebra.second_moment import SecondMoment
from mergekit_pave.calibration import run as calibration_run
from mergekit_pave.calibration import stores
from mergekit_pave.calibration.collect import (
    NotFinite,
    SitePlan,
    collect_window,
    plan_sites,
    windows,
)
from mergekit_pave.calibration.load import Resources, load_model
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.calibration.stores import cached_store
from mergekit_pave.errors import PaveError
from mergekit_pave.models.layers import linear_layers
from mergekit_pave.storage.covariances import MANIFEST


@pytest.mark.parametrize("kind", ["llama", "roberta", "deberta", "gpt2", "t5", "bert"])
def test_covariances_match_one_sequence_at_a_time(families, texts, tmp_path, kind):
    path, spec = families(kind)["expert0"], spec_of(texts[0])
    store = calibrate_to(source_of(path), spec, tmp_path / "store", Resources())
    assert worst(store, reference(path, kind, spec)) < 1e-5
    assert not [r for r in store.skipped.values() if r.startswith("its input")]


def test_another_config_is_another_model(families, texts, tmp_path):
    """The same weights under another norm see other inputs; other labels change nothing."""
    path, spec = families("llama")["expert0"], spec_of(texts[0])
    store = cached_store(source_of(path), spec, Resources())
    config = json.loads((path / "config.json").read_text())
    for name, changes, same in (
        ("labels", {"id2label": {"0": "a"}, "label2id": {"a": 0}, "dtype": "float16"}, True),
        ("norm", {"rms_norm_eps": 0.5}, False),
    ):
        copy = shutil.copytree(path, tmp_path / name)
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        found = cached_store(source_of(copy), spec, Resources())
        assert (found.folder == store.folder) is same
    assert worst(found, reference(tmp_path / "norm", "llama", spec)) < 1e-5


def test_a_classifier_without_a_padding_token(families, texts, tmp_path):
    """Its head refuses more than one row, and is not needed."""
    path = families("llama")["expert0"]
    model = transformers.LlamaForSequenceClassification.from_pretrained(path)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    spec = spec_of(texts[0], max_seq_length=4)
    store = calibrate_to(source_of(tmp_path / "model"), spec, tmp_path / "store", Resources())
    assert worst(store, reference(path, "llama", spec)) < 1e-5


def test_image_models_match_too(families, tmp_path):
    from helpers import write_images

    spec = spec_of(write_images(tmp_path / "images"), text_column="image")
    path = families("vit")["expert0"]
    store = calibrate_to(source_of(path), spec, tmp_path / "store", Resources())
    assert worst(store, reference(path, "vit", spec)) < 1e-5


@pytest.mark.parametrize(
    "changes, resources",
    [
        ({"batch_size": 1}, Resources()),
        ({"batch_size": 16}, Resources()),
        ({}, Resources(statistics_memory=1)),  # one site per window
        ({}, Resources(statistics_memory=3 * 4 * 32**2)),
        ({}, Resources(max_memory=20_000)),  # most weights stay on disk
        ({}, Resources(max_memory=20_000, statistics_memory=1)),
    ],
)
def test_batches_windows_and_offload_change_nothing(families, texts, tmp_path, changes, resources):
    path = families("llama")["expert0"]
    spec = spec_of(texts[0], **changes)
    store = calibrate_to(source_of(path), spec, tmp_path / "store", resources)
    assert worst(store, reference(path, "llama", spec)) < 1e-5


def test_disk_offload_reads_the_shards_in_place(families):
    path = families("llama")["expert0"]
    model = load_model(source_of(path), device=torch.device("cpu"), max_memory=20_000)
    assert "disk" in set(model.hf_device_map.values())
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("kind", ["pickled", "experts"])
def test_weights_that_shards_do_not_hold_ready_are_offloaded_too(tmp_path, texts, kind):
    """transformers writes these anew, somewhere; nothing of it may stay in the store."""
    torch.manual_seed(0)
    common = dict(vocab_size=94, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
                  intermediate_size=48, num_key_value_heads=2)
    path = tmp_path / "model"
    if kind == "pickled":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
        model.save_pretrained(path)
        (path / "model.safetensors").unlink()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    else:
        config = transformers.MixtralConfig(**common, num_local_experts=4)
        transformers.MixtralForCausalLM(config).save_pretrained(path)
    write_tokenizer(path)
    source, spec = source_of(path), spec_of(texts[0])
    whole = calibrate_to(source, spec, tmp_path / "whole", Resources())
    store = calibrate_to(source, spec, tmp_path / "s", Resources(max_memory=20_000))
    assert store.weights == whole.weights and store.sites.keys() == whole.sites.keys()
    for site in whole.sites:
        torch.testing.assert_close(store.covariance(site), whole.covariance(site))
    assert not list(store.folder.glob(".offload*"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_changes_nothing(tmp_path, texts, side):
    path = make_family(tmp_path, "llama", experts=1)["expert0"]
    write_tokenizer(path, padding_side=side)
    spec = spec_of(texts[0], batch_size=16)
    store = calibrate_to(source_of(path), spec, tmp_path / "store", Resources())
    assert worst(store, reference(path, "llama", spec)) < 1e-5


def test_layers_that_read_one_tensor_share_a_covariance(families, texts, tmp_path):
    path = families("llama")["expert0"]
    store = calibrate_to(source_of(path), spec_of(texts[0]), tmp_path / "s", Resources())
    attention = "model.layers.0.self_attn."
    sites = {store.weights[f"{attention}{x}_proj.weight"].site for x in "qkv"}
    assert sites == {f"{attention}q_proj.weight"}
    assert store.weights[f"{attention}o_proj.weight"].site not in sites
    assert len(store.sites) == 8 and len(store.weights) == 14
    assert store.skipped == {"lm_head.weight": "vocabulary layer"}


def test_unreached_and_repeated_layers_do_not_share():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in range(3))
            self.device, self.dtype, self.config = torch.device("cpu"), torch.float32, None

        def forward(self, x):
            return self.a(x) + self.b(x) + self.a(self.b(x) + 1)

    model = Odd()
    modules = {"a": model.a, "b": model.b, "c": model.c}
    sites = plan_sites(model, modules, {"x": torch.ones(2, 3)})
    assert {(s.weights, s.calls) for s in sites} == {(("a",), 2), (("b",), 2), (("c",), 0)}


def test_inputs_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    modules = {"0.weight": model[0], "1.weight": model[1]}
    window = [SitePlan((name,), 3, 1) for name in modules]
    model.device, model.dtype, model.config = torch.device("cpu"), torch.float32, None
    for value in (float("nan"), float("inf"), float("-inf")):
        good, bad = torch.ones(2, 3), torch.ones(2, 3)
        bad[1, 2] = value
        with pytest.raises(NotFinite, match="input of 0 holds NaN or Inf in calibration batch 1"):
            collect_window(model, modules, window, [{"input": good}, {"input": bad}], tqdm())


@pytest.mark.parametrize("width", [5, 256, 700, 2100])
def test_sums_by_blocks_are_the_whole_product(width):
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    moment = SecondMoment(width).add(x[:20]).add(x[20:])
    expected = x.double().T @ x.double() / 50
    mean = mean_of(moment)
    assert (mean - expected).norm() < 1e-6 * expected.norm()
    assert torch.equal(mean, mean.T)


def test_windows_fit_the_budget():
    sites = [SitePlan((str(i),), width, 1) for i, width in enumerate([4, 4, 8, 2, 2])]
    assert [[s.width for s in w] for w in windows(sites, 4 * 32)] == [[4, 4], [8], [2, 2]]
    assert windows([], 10) == []


def test_cache_is_addressed_by_content(families, texts, tmp_path, monkeypatch):
    paths = families("llama")
    calls = []
    real = stores.compute
    monkeypatch.setattr(stores, "compute", lambda *a: calls.append(a) or real(*a))

    def folder(path, **changes):
        return cached_store(source_of(path), spec_of(texts[0], **changes), Resources()).folder

    first = folder(paths["expert0"])
    assert folder(paths["expert0"], batch_size=2) == first and len(calls) == 1
    assert folder(paths["expert1"]) != first
    assert folder(paths["expert0"], seed=1) != first
    assert folder(paths["expert0"], num_samples=10) != first
    copy = tmp_path / "moved"
    transformers.AutoModelForCausalLM.from_pretrained(paths["expert0"]).save_pretrained(copy)
    write_tokenizer(copy)
    assert folder(copy) == first and len(calls) == 4
    state = load_file(copy / "model.safetensors")
    state["model.embed_tokens.weight"][45:47] = 0  # a sample would not see it
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    assert folder(copy) != first


def test_a_store_found_again_names_the_data_as_they_are_called_now(families, texts, tmp_path):
    source = source_of(families("llama")["expert0"])
    secret, renamed = tmp_path / "acme-secret.jsonl", tmp_path / "task.jsonl"
    secret.write_bytes(texts[0].read_bytes())
    first = cached_store(source, spec_of(secret), Resources())
    assert first.manifest["data"]["dataset"] == "acme-secret.jsonl"
    secret.rename(renamed)
    again = cached_store(source, spec_of(renamed), Resources())
    assert again.folder == first.folder
    assert again.manifest["data"] == {**first.manifest["data"], "dataset": "task.jsonl"}


def test_an_interrupted_calibration_is_resumed(families, texts, tmp_path, monkeypatch):
    source, spec = source_of(families("llama")["expert0"]), spec_of(texts[0])
    whole = calibrate_to(source, spec, tmp_path / "whole", Resources(statistics_memory=1))
    real, done = collect_window, []

    def interrupted(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args[2][0].name)
        return real(*args)

    monkeypatch.setattr(calibration_run, "collect_window", interrupted)
    folder, resources = tmp_path / "part", Resources(statistics_memory=1)
    with pytest.raises(KeyboardInterrupt):
        calibrate_to(source, spec, folder, resources)
    assert not (folder / MANIFEST).exists()
    monkeypatch.setattr(calibration_run, "collect_window", lambda *a: done.append(a) or real(*a))
    store = calibrate_to(source, spec, folder, resources)
    assert len(done) == len(store.sites) == 8
    for site in whole.sites:
        assert torch.equal(whole.covariance(site), store.covariance(site))


def test_a_folder_of_another_calibration_is_refused(families, texts, tmp_path, monkeypatch):
    source = source_of(families("llama")["expert0"])
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibration_run, "collect_window", stop)
        calibrate_to(source, spec_of(texts[0]), tmp_path / "s", Resources())
    with pytest.raises(PaveError, match="unfinished calibration of another model or other data"):
        calibrate_to(source, spec_of(texts[1]), tmp_path / "s", Resources())
    calibrate_to(source, spec_of(texts[0]), tmp_path / "s", Resources())
    with pytest.raises(PaveError, match="already holds a covariance store"):
        calibrate_to(source, spec_of(texts[0]), tmp_path / "s", Resources())


def test_the_manifest_says_what_was_done_and_no_path(families, texts, tmp_path):
    path = families("llama")["expert0"]
    store = calibrate_to(source_of(path), spec_of(texts[0]), tmp_path / "s", Resources())
    manifest = json.loads((store.folder / MANIFEST).read_text())
    assert manifest["data"]["tokens"] == store.sites["model.layers.0.mlp.down_proj.weight"].count
    assert manifest["model"]["id"] == "expert0"
    for file in store.folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert str(path.parent).encode() not in file.read_bytes()


def test_heads_and_vocabulary_are_left_out(families):
    for kind, left_out in {
        "roberta": {"classifier.dense.weight", "classifier.out_proj.weight"},
        "gpt2": {"lm_head.weight"},
        "bert": set(),
        "vit": {"classifier.weight"},
    }.items():
        path = families(kind)["base"]
        model = getattr(transformers, CLASSES[kind]).from_pretrained(path)
        assert set(linear_layers(model).skipped) == left_out


def test_half_precision_checkpoints_are_recognised(tmp_path):
    data = write_texts(tmp_path / "t.jsonl")
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        path = make_family(folder, "llama", experts=1, dtype=dtype)["expert0"]
        source = source_of(path)
        store = cached_store(source, spec_of(data), Resources())
        found = {store.find(name, tensor) for name, tensor in source.tensors()} - {None}
        assert found == set(store.weights)
