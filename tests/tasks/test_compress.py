"""`mergekit-pave compress` and `reconstruct`: what is on disk, what comes back, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from helpers import invoke, make_family, tensors_of
from safetensors.torch import load_file, save_file

from mergekit_pave.algebra.tsv import kept_rank
from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import companions, copy_companions
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.storage import low_rank as compressed
from mergekit_pave.storage.low_rank import Compressed, pack, restore
from mergekit_pave.tasks import compress as module
from mergekit_pave.tasks import compress_task
from mergekit_pave.tasks.compress import compress
from mergekit_pave.tasks.reconstruct import reconstruct

NORM = "model.layers.0.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def raw(paths: dict, experts: int = 2) -> dict:
    """A merge as it is used for `ties`, whose parameters do not matter here."""
    models = [{"model": str(paths[f"expert{i}"]), "parameters": {"weight": 1, "density": 0.2}}
              for i in range(experts)]
    return {"merge_method": "ties", "base_model": str(paths["base"]), "models": models}


@pytest.fixture
def config(families, tmp_path):
    def write(content=None, **changes) -> Path:
        content = {**raw(families("llama")), **changes} if content is None else content
        file = tmp_path / "merge.yml"
        file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return file

    return write


def truncated(tuned: torch.Tensor, base: torch.Tensor, k: int) -> torch.Tensor:
    delta = tuned.double().numpy() - base.double().numpy()
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return base.double() + torch.from_numpy(u[:, :k] * s[:k] @ v[:k])


# --- one tensor ----------------------------------------------------------------------------


def test_each_tensor_is_kept_in_the_cheapest_way():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    tuned = base + torch.randn(40, 30, generator=generator)
    some = base.clone()
    some[[3, 7]] = tuned[[3, 7]]

    def how(new, old, k=4):
        way, stored, _ = pack(new, old, k, torch.float32)
        if way != "factors":
            assert torch.equal(restore(way, stored, old, new.dtype), new)
        return way, sum(part.numel() for part in stored.values())

    assert how(base.clone(), base) == ("base", 0)
    assert how(some, base) == ("rows", 2 * 31)
    assert how(tuned, base) == ("factors", 4 * 71)
    assert how(tuned, base, 17) == ("whole", 1200)  # 17 * 71 numbers would be more
    assert how(tuned[:2], base[:2], 1) == ("factors", 33)
    assert how(tuned[0], base[0]) == ("whole", 30)
    assert how(tuned.reshape(4, 10, 30), base.reshape(4, 10, 30))[0] == "whole"
    assert how(tuned, None)[0] == "whole"
    assert how(torch.arange(3), torch.arange(3))[0] == "base"
    assert how(torch.arange(3), torch.arange(3) + 1)[0] == "whole"
    assert how(base.bfloat16(), base)[0] == "base"


@pytest.mark.parametrize("shape", [(32, 32), (40, 30), (30, 40), (90, 30)])
@pytest.mark.parametrize("spectrum", ["flat", "steep", "exact", "one more"])
def test_a_matrix_becomes_factors_where_all_its_triples_are_smaller(shape, spectrum, monkeypatch):
    """Whatever rank it may have; a look at a part of it only saves time."""
    generator = torch.Generator().manual_seed(0)
    most = (shape[0] * shape[1] - 1) // (sum(shape) + 1)
    full = min(shape)
    s = {"flat": torch.ones(full), "steep": torch.logspace(0, -9, full),
         "exact": (torch.arange(full) < most).double(),
         "one more": (torch.arange(full) < most + 1).double()}[spectrum]
    u, v = (torch.linalg.qr(torch.randn(n, full, generator=generator, dtype=torch.float64)).Q
            for n in shape)
    base = torch.zeros(shape, dtype=torch.float64)
    tuned = (u * s) @ v.T
    there = int((s > 1e-5).sum())
    for look in (compressed._exceeds, lambda *_: False):
        monkeypatch.setattr(compressed, "_exceeds", look)
        way, stored, _ = pack(tuned, base, full, torch.float64)
        assert way == ("factors" if there <= most else "whole")
        if way == "factors":
            assert len(stored["::s"]) == there
            assert (restore(way, stored, base, tuned.dtype) - tuned).norm() < 1e-4 * tuned.norm()


def test_full_matrices_are_not_decomposed_in_vain(monkeypatch):
    monkeypatch.setattr(compressed, "factors", None)
    generator = torch.Generator().manual_seed(0)
    tuned, base = (torch.randn(40, 40, generator=generator) for _ in range(2))
    assert pack(tuned, base, 20, torch.float32)[0] == "whole"


def test_the_shares_that_are_documented():
    for shape, share in (((768, 768), 0.25), ((3072, 768), 0.156)):
        k = kept_rank(shape, 8)
        assert k * (sum(shape) + 1) / (shape[0] * shape[1]) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_in_every_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    tuned = base + 1e-3 * torch.randn(40, 30, generator=generator)
    way, stored, energy = pack(tuned, base, 6, dtype)
    found = restore(way, stored, base, torch.float32)
    want = truncated(tuned, base, 6)
    assert stored["::u"].dtype == stored["::v"].dtype == dtype
    assert (found - want).norm() <= 2 * torch.finfo(dtype).eps * (want - base).norm() + 1e-6
    assert energy[0] / energy[1] == pytest.approx(
        ((want - base).norm() / (tuned - base).double().norm()).item() ** 2, rel=1e-6)


# --- on disk -------------------------------------------------------------------------------


def test_what_comes_back_is_the_truncated_fine_tune(families, config, tmp_path):
    paths = families("llama")
    code, out, err = invoke("compress", config(), tmp_path / "c")
    assert code == 0, err
    base = tensors_of(paths["base"])
    for i, line in enumerate(out.splitlines()):
        task = tmp_path / "c" / f"expert{i}"
        code, said, _ = invoke("reconstruct", task, tmp_path / f"m{i}", "--base", paths["base"])
        assert code == 0 and said == f"{tmp_path / f'm{i}'}: reconstructed from {task}.\n"
        tuned, found = tensors_of(paths[f"expert{i}"]), tensors_of(tmp_path / f"m{i}")
        kept = Compressed(task).tensors
        assert found.keys() == tuned.keys() == kept.keys()
        for name, tensor in found.items():
            small = tensor.ndim < 2 or kept[name].how == "whole"
            rank = min(tensor.shape) // 2
            if small:
                assert torch.equal(tensor, tuned[name]), name
            else:
                assert torch.allclose(tensor.double(), truncated(tuned[name], base[name], rank),
                                      atol=1e-6), name
            dtype = tensor.dtype
            way, stored, _ = pack(tuned[name], base[name], rank if tensor.ndim == 2 else 0, dtype)
            assert torch.equal(restore(way, stored, base[name], dtype), tensor), name
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"m{i}")
        state = model.state_dict()
        assert all(torch.equal(state[name], found[name]) for name in found)
        assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / f"m{i}")) == 94
        assert line.startswith(f"expert{i}: ")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["expert0", "expert1"]


def test_what_is_reported_is_true(families, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "WINDOW", 10_000)  # several files
    paths = families("llama")
    summary = compress(raw(paths), tmp_path / "c", rank_fraction=0.25)[0]
    task = tmp_path / "c" / "expert0"
    files = list(task.glob("*.safetensors"))
    assert len(files) > 2 and summary.stored == sum(f.stat().st_size for f in files)
    tuned, base = tensors_of(paths["expert0"]), tensors_of(paths["base"])
    assert summary.model == sum(t.numel() * 4 for t in tuned.values())
    kept = Compressed(task).tensors
    assert summary.ways == {"base": 5, "rows": 0, "factors": 16, "whole": 0}
    assert {n for n in tuned if tuned[n].ndim == 2} == {
        n for n in kept if kept[n].how == "factors"}
    energies, share, total = {}, 0, 0
    for name in (n for n in kept if kept[n].how == "factors"):
        s = np.linalg.svd((tuned[name].double() - base[name].double()).numpy(), compute_uv=False)
        energies[name] = (s[:len(s) // 4] ** 2).sum(), (s**2).sum()
        share += len(s) // 4 * (sum(tuned[name].shape) + 1)
        total += tuned[name].numel()
    worst = min(energies, key=lambda n: energies[n][0] / energies[n][1])
    left, whole = (sum(e[i] for e in energies.values()) for i in range(2))
    assert summary.energy == pytest.approx(left / whole, rel=1e-4)
    assert summary.worst[0] == worst
    assert summary.worst[1] == pytest.approx(energies[worst][0] / energies[worst][1], rel=1e-4)
    assert summary.share == share / total
    text = str(summary)
    assert f"{summary.stored:,} bytes" in text and f"least: {summary.worst[1]:.1%} of " in text
    assert "16 matrices as factors" in text and "5 as in the base" in text
    reconstruct(task, tmp_path / "m", base=str(paths["base"]))


def test_rank_one_is_all_of_it(families, tmp_path):
    """Whole ranks would take more room than the matrices."""
    paths = families("llama")
    (summary, _) = compress(raw(paths), tmp_path / "c", rank_fraction=1.0)
    assert summary.ways["factors"] == 0 and summary.worst is None
    assert "as factors" not in str(summary)
    reconstruct(tmp_path / "c" / "expert0", tmp_path / "m", base=str(paths["base"]))
    tuned, found = tensors_of(paths["expert0"]), tensors_of(tmp_path / "m")
    assert all(torch.equal(tuned[n], found[n]) for n in tuned)


def test_nothing_to_gain_is_said(families, config, tmp_path):
    """One fine-tune has the whole rank; all its tensors have changed."""
    paths = dict(families("llama"))
    state = {name: tensor + 1e-3 for name, tensor in tensors_of(paths["expert0"]).items()}
    path = shutil.copytree(paths["expert0"], tmp_path / "all")
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    made = raw({**paths, "expert0": path}, experts=1)
    code, out, err = invoke("compress", config(made), tmp_path / "c")
    assert code == 0, err
    assert "0 matrices as factors" not in out and "21 tensors whole" in out
    assert "of 16 changed matrices would be no smaller than these are: lower --rank-fraction" in out
    reconstruct(tmp_path / "c" / "all", tmp_path / "m", base=str(paths["base"]))
    found = tensors_of(tmp_path / "m")
    assert all(torch.equal(found[name], state[name]) for name in state)
    for options in ({"rank_fraction": 1.0}, {"rank_fraction": 0.25}):
        out = tmp_path / str(options["rank_fraction"])
        said = str(compress(raw({**paths, "expert0": path}), out, **options)[0])
        assert ("lower --rank-fraction" in said) == (options["rank_fraction"] == 1)
    with pytest.raises(PaveError, match="no changed nn.Linear .*: lower --rank-fraction, or leave"):
        compress(made, tmp_path / "d", lora=True)


def test_what_equals_the_base_takes_no_room(families, tmp_path):
    paths = dict(families("llama"))
    base, tuned = tensors_of(paths["base"]), tensors_of(paths["expert0"])
    some = base["model.embed_tokens.weight"].clone()
    some[5:9] += 1
    state = {**base, UP: tuned[UP], "model.embed_tokens.weight": some}
    paths["expert0"] = shutil.copytree(paths["base"], tmp_path / "frozen")
    save_file(state, paths["expert0"] / "model.safetensors", metadata={"format": "pt"})
    summary = compress(raw(paths), tmp_path / "c")[0]
    assert summary.ways == {"base": 19, "rows": 1, "factors": 1, "whole": 0}
    reconstruct(tmp_path / "c" / "frozen", tmp_path / "m", base=str(paths["base"]))
    found = tensors_of(tmp_path / "m")
    assert all(torch.equal(found[n], state[n]) for n in state if n != UP)


@pytest.mark.parametrize("given", [None, "float32", "float16"])
def test_half_precision(tmp_path, given):
    paths = make_family(tmp_path, "llama", dtype=torch.bfloat16)
    compress(raw(paths), tmp_path / "c", dtype=given)
    stored = load_file(tmp_path / "c" / "expert0" / "tensors-00000.safetensors")
    assert stored[UP + "::u"].dtype == getattr(torch, given or "bfloat16")
    assert stored[UP + "::s"].dtype == torch.float32
    reconstruct(tmp_path / "c" / "expert0", tmp_path / "m", base=str(paths["base"]))
    found, tuned = tensors_of(tmp_path / "m"), tensors_of(paths["expert0"])
    assert all(t.dtype == torch.bfloat16 for t in found.values())
    assert torch.equal(found[NORM], tuned[NORM])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["sharded", "bin"])
def test_checkpoint_kinds_change_nothing(tmp_path, kind):
    plain = make_family(tmp_path / "a", "llama")
    save = {"max_shard_size": "20KB"} if kind == "sharded" else {}
    paths = make_family(tmp_path / "b", "llama", **save)
    if kind == "bin":
        for path in paths.values():
            torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
            (path / "model.safetensors").unlink()
    for i, family in enumerate((plain, paths)):
        compress(raw(family), tmp_path / f"c{i}")
        # The base may be stored otherwise than when it was compressed against.
        reconstruct(tmp_path / f"c{i}" / "expert1", tmp_path / f"m{i}", base=str(plain["base"]))
    one, other = tensors_of(tmp_path / "m0"), tensors_of(tmp_path / "m1")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_head_and_a_config_of_its_own(families, tmp_path):
    """The base has no classifier of this size: it is stored whole, and the config beside it."""
    paths = dict(families("roberta"))
    tuned = tensors_of(paths["expert0"])
    path = shutil.copytree(paths["expert0"], tmp_path / "odd")
    tuned["extra.weight"] = torch.randn(40, 30)
    save_file(tuned, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "_name_or_path": str(path)}
    (path / "config.json").write_text(json.dumps(config))
    compress(raw({**paths, "expert0": path}), tmp_path / "c")
    # What the base's folder has by now is not what the fine-tune had.
    base = shutil.copytree(paths["base"], tmp_path / "base")
    for name in ("config.json", "tokenizer_config.json"):
        (base / name).write_text("{}")
    (base / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    paths["base"] = base
    reconstruct(tmp_path / "c" / "odd", tmp_path / "m", base=str(paths["base"]))
    assert torch.equal(tensors_of(tmp_path / "m")["extra.weight"], tuned["extra.weight"])
    assert transformers.AutoConfig.from_pretrained(tmp_path / "m").id2label[1] == "b"
    found = json.loads((tmp_path / "m" / "config.json").read_text())
    assert found["_name_or_path"] == "odd" and found["layer_norm_eps"] != 0.5
    for name in companions(path):
        assert (tmp_path / "m" / name).exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab()


@pytest.mark.parametrize("name", ["bpe.codes", "tekken.json", "vocab-src.json", "merges.txt",
                                  "tokenizer.model", "preprocessor_config.json", "modeling_x.py"])
def test_files_of_the_tokenizer_come_along(families, tmp_path, name):
    paths = families("llama")
    tuned = tmp_path / "tuned"
    shutil.copytree(paths["expert0"], tuned)
    (tuned / name).write_text("of its own")
    (tuned / "training_args.bin").write_text("not of the model")
    (tuned / "trainer_state.json").write_text("{}")
    copy_companions(companions(tuned), tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert name in names and not {"training_args.bin", "trainer_state.json"} & {*names}
    assert (tmp_path / "out" / name).read_text() == "of its own"


def test_names_are_public(families, tmp_path):
    compress(raw(families("llama")), tmp_path / "c", lora=True)
    for file in (tmp_path / "c").rglob("*.json"):
        assert str(tmp_path.parent) not in file.read_text(), file
    manifest = json.loads((tmp_path / "c" / "expert0" / "manifest.json").read_text())
    assert manifest["base"] == {"id": "base", "hub": None} and manifest["model"] == "expert0"
    assert manifest["tasks"] == 2 and manifest["rank_fraction"] is None


def test_models_of_the_same_name_are_told_apart(families, tmp_path):
    paths = families("llama")
    models = [shutil.copytree(paths["expert0"], tmp_path / part / "same") for part in "ab"]
    made = {"base": paths["base"], "expert0": models[0], "expert1": models[1]}
    assert [s.task for s in compress(raw(made), tmp_path / "c")] == ["same", "same-2"]


def test_an_interrupted_run_goes_on(families, config, tmp_path, monkeypatch):
    paths, calls = families("llama"), []
    work = compress_task.compress_task

    def stop(tuned, *arguments):
        calls.append(tuned.label)
        work(tuned, *arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "compress_task", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(raw(paths), tmp_path / "c")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["expert0"]
    with pytest.raises(PaveError, match="expert0 is not from an interrupted run with these"):
        compress(raw(paths), tmp_path / "c", rank_fraction=0.1)
    summaries = compress(raw(paths), tmp_path / "c")
    assert calls == ["expert0", "expert1", "expert1"]
    assert [s.task for s in summaries] == ["expert0", "expert1"]
    code, out, err = invoke("compress", config(), tmp_path / "c")
    assert code == 1 and not out and "already holds expert0; choose another folder" in err


# --- adapters ------------------------------------------------------------------------------


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


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "words"), [
    ({"base_model": None}, "base_model is missing: compress needs `base_model: NAME`"),
    ({"models": None, "slices": []}, "models is missing"),
    ({"models": [{"model": "base"}], "base_model": "base"}, "no fine-tuned model beside the base"),
    ({"models": [{"model": "a"}, {"model": "a"}]}, "a is listed twice"),
    ({"models": [{"model": "./nowhere"}]}, "There is no model folder ./nowhere"),
    ({"base_model": "./nowhere"}, "There is no model folder ./nowhere"),
    ({"models": "x"}, "mergekit cannot read the configuration: models"),
])
def test_configurations_that_are_refused(config, tmp_path, changes, words):
    code, out, err = invoke("compress", config(**changes), tmp_path / "c")
    assert code == 1 and words in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "c").exists()


def test_the_method_may_be_missing(families, config, tmp_path):
    content = raw(families("llama"))
    del content["merge_method"]
    assert invoke("compress", config(content), tmp_path / "c")[0] == 0


@pytest.mark.parametrize("fraction", ["0", "1.5", "-1", "x", "nan"])
def test_fractions_that_are_refused(families, config, tmp_path, fraction):
    code, _, err = invoke("compress", config(), tmp_path / "c", f"--rank-fraction={fraction}")
    assert code and "fraction" in err and "Traceback" not in err
    with pytest.raises(PaveError, match="rank_fraction must be"):
        compress(raw(families("llama")), tmp_path / "c", rank_fraction=fraction)
    assert not (tmp_path / "c").exists()


def test_folders_that_are_refused(families, config, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    (tmp_path / "file").touch()
    for name, words in (("used", "already holds mine.txt"), ("file", "is a file")):
        code, _, err = invoke("compress", config(), tmp_path / name)
        assert code == 1 and words in err
    compress(raw(families("llama")), tmp_path / "c")
    task, base = tmp_path / "c" / "expert0", str(families("llama")["base"])
    for name in ("used", "file"):
        with pytest.raises(PaveError, match=f"{name} exists already"):
            reconstruct(task, tmp_path / name, base=base)
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as mounted:  # nobody may mount one for a test
        mounted.setattr(os.path, "ismount", lambda path: os.path.basename(path) == "disk")
        with pytest.raises(PaveError, match="disk is a mount point; name a folder in it"):
            reconstruct(task, tmp_path / "disk", base=base)
    with pytest.raises(PaveError, match="no manifest.json.*: name a task's folder"):
        reconstruct(tmp_path / "c", tmp_path / "m", base=base)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64,
                                   torch.float8_e4m3fn, torch.complex64])
def test_tensors_of_any_dtype_come_back(families, tmp_path, dtype):
    """Buffers of old checkpoints: GPT-NeoX's causal masks, for one."""
    paths = dict(families("llama"))
    for name, changed in (("base", 0), ("expert0", 0), ("expert1", 1)):
        paths[name] = shutil.copytree(paths[name], tmp_path / name)
        state = tensors_of(paths[name])
        state["buffer"] = torch.tensor([0, 1, changed]).to(dtype)
        save_file(state, paths[name] / "model.safetensors", metadata={"format": "pt"})
    compress(raw(paths), tmp_path / "c")
    for name in ("expert0", "expert1"):
        reconstruct(tmp_path / "c" / name, tmp_path / f"m-{name}", base=str(paths["base"]))
        found = tensors_of(tmp_path / f"m-{name}")["buffer"]
        wanted = tensors_of(paths[name])["buffer"]
        assert found.dtype == dtype and torch.equal(found.float(), wanted.float())


def test_a_base_that_differs_in_a_few_rows_is_another(families, tmp_path):
    paths = dict(families("llama"))
    compress(raw(paths), tmp_path / "c")
    other = shutil.copytree(paths["base"], tmp_path / "other")
    state = tensors_of(other)
    assert state["model.embed_tokens.weight"].numel() > 1500  # of which 512 would be a sample
    state["model.embed_tokens.weight"][45:47] = 0
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaveError, match="other is not the base .*embed_tokens"):
        reconstruct(tmp_path / "c" / "expert0", tmp_path / "m", base=str(other))


def test_a_change_of_one_rounding_is_kept(families, tmp_path):
    paths = dict(families("llama"))
    paths["expert0"] = shutil.copytree(paths["base"], tmp_path / "nudged")
    state = tensors_of(paths["expert0"])
    name = "model.layers.0.mlp.up_proj.weight"
    state[name][:, 3] = torch.nextafter(state[name][:, 3], torch.tensor(9.0))
    save_file(state, paths["expert0"] / "model.safetensors", metadata={"format": "pt"})
    compress(raw(paths), tmp_path / "c")
    reconstruct(tmp_path / "c" / "nudged", tmp_path / "m", base=str(paths["base"]))
    assert torch.equal(tensors_of(tmp_path / "m")[name], state[name])


def test_a_merged_adapter_has_its_tokenizer(families, tmp_path):
    """mergekit's copy of model and adapter has none."""
    paths = dict(families("llama"))
    adapter = tmp_path / "adapter"
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["base"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(adapter)
    for ships in (True, False):
        if ships:
            tokenizer = transformers.AutoTokenizer.from_pretrained(paths["base"])
            tokenizer.chat_template = "{{ messages }} of the adapter"
            tokenizer.save_pretrained(adapter)
        else:
            for file in companions(adapter).values():
                file.unlink()
        folder = tmp_path / f"c-{ships}"
        made = {"base": paths["base"], "expert0": f"{paths['base']}+{adapter}",
                "expert1": paths["expert1"]}
        options = LoaderOptions(lora_merge_cache=str(tmp_path / "merged"))
        (task, _) = compress(raw(made), folder, options=options)
        reconstruct(folder / task.task, tmp_path / f"m-{ships}", base=str(paths["base"]))
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / f"m-{ships}")
        assert (found.chat_template or "").endswith("of the adapter") == ships
        assert found.get_vocab()


def test_an_empty_folder_stays_the_same_folder(families, tmp_path, monkeypatch):
    compress(raw(families("llama")), tmp_path / "c")
    (tmp_path / "here").mkdir()
    before = (tmp_path / "here").stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    reconstruct(tmp_path / "c" / "expert0", ".", base=str(families("llama")["base"]))
    assert (tmp_path / "here").stat().st_ino == before
    assert os.path.exists("config.json") and tensors_of(Path("."))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "here"]


def test_models_that_do_not_fit(families, tmp_path):
    paths = families("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_task, "pack", None)  # said before the work
        with pytest.raises(PaveError, match="shares no tensor's name with the base"):
            compress(raw({**paths, "base": families("roberta")["base"]}), tmp_path / "c")
    wide = shutil.copytree(paths["base"], tmp_path / "wide")
    state = tensors_of(wide)
    state[NORM] = torch.ones(33)
    save_file(state, wide / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaveError, match=r"is \(32,\) and \(33,\) in the base wide"):
        compress(raw({**paths, "base": wide}), tmp_path / "c")
    state[NORM] = torch.ones(32)
    state[UP][0, 0] = torch.inf
    save_file(state, wide / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaveError, match="up_proj.weight of expert0 or of its base holds NaN"):
        compress(raw({**paths, "base": wide}), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_filled(families, tmp_path, there):
    paths = families("llama")
    compress(raw(paths), tmp_path / "c")
    target, link = tmp_path / "disk" / "m", tmp_path / "m"
    if there:
        target.mkdir(parents=True)
    link.symlink_to(target)
    reconstruct(tmp_path / "c" / "expert0", link, base=str(paths["base"]))
    assert link.is_symlink() and (link / "config.json").is_file()
    assert tensors_of(target).keys() == tensors_of(paths["expert0"]).keys()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["m"]


def test_reconstruction_needs_the_very_base(families, tmp_path):
    paths = families("llama")
    compress(raw(paths), tmp_path / "c")
    task = tmp_path / "c" / "expert0"
    with pytest.raises(PaveError, match="local base base: name its folder with --base"):
        reconstruct(task, tmp_path / "m")
    with pytest.raises(PaveError, match="expert1 is not the base that .* \\(first difference: "):
        reconstruct(task, tmp_path / "m", base=str(paths["expert1"]))
    with pytest.raises(PaveError, match="There is no model folder /nowhere"):
        reconstruct(task, tmp_path / "m", base="/nowhere")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))


@pytest.mark.parametrize("damage", [
    "cut", "gone", "model", "manifest", "kind", "format", "how", "dtype", "file", "outside"])
def test_damage_is_named(families, tmp_path, damage):
    paths = families("llama")
    compress(raw(paths), tmp_path / "c")
    task = tmp_path / "c" / "expert0"
    file, manifest = task / "tensors-00000.safetensors", task / "manifest.json"
    words = "is damaged .*; compress again"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "model":
        shutil.rmtree(task / "model")
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text('{"kind": "mergekit-pave compressed model", "format": 2}')
    elif damage in ("how", "dtype", "file", "outside"):
        content = json.loads(manifest.read_text())
        kept = next(t for t in content["tensors"].values() if t["how"] == "factors")
        key = damage if damage in kept else "file"
        kept[key] = {"file": None, "outside": f"../expert1/{kept['file']}"}.get(damage, "x")
        manifest.write_text(json.dumps(content))
    elif damage == "kind":
        manifest.write_text("[]")
        words = "something else than a compressed model"
    else:
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 9'))
        words = "another version of mergekit-pave"
    with pytest.raises(PaveError, match=words):
        reconstruct(task, tmp_path / "m", base=str(paths["base"]))
    assert not (tmp_path / "m").exists()
