"""`mergekit-pave compress`: what is on disk and what comes back."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from helpers import invoke, make_family, tensors_of
from helpers.compress import NORM, UP, raw, truncated
from safetensors.torch import load_file, save_file

from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import companions, copy_companions
from mergekit_pave.storage import low_rank as compressed
from mergekit_pave.storage.low_rank import Compressed, pack, restore
from mergekit_pave.tasks import compress as module
from mergekit_pave.tasks import compress_task
from mergekit_pave.tasks.compress import compress
from mergekit_pave.tasks.reconstruct import reconstruct


def test_what_comes_back_is_the_truncated_fine_tune(families, config, tmp_path):
    paths = families("llama")
    code, out, err = invoke("compress", config(), tmp_path / "c")
    assert code == 0, err
    base = tensors_of(paths["base"])
    *summaries, advice = out.splitlines()
    assert f"reconstruct {tmp_path / 'c'}/TASK DIR" in advice
    for i, line in enumerate(summaries):
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


def test_a_tied_head_that_is_stored_too_stays_tied(families, tmp_path):
    paths = dict(families("llama"))
    path = paths["expert0"] = shutil.copytree(paths["expert0"], tmp_path / "tied")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    state = tensors_of(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    compress(raw(paths, experts=1), tmp_path / "c", rank_fraction=0.25)
    reconstruct(tmp_path / "c" / "tied", tmp_path / "m", base=str(paths["base"]))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight


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
    compress(raw(families("llama")), tmp_path / "c")
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
