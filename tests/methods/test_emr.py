"""EMR-Merging: the algebra against the paper's definition, and task models told from disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from helpers import CLASSES, emr_config, make_family, merge, tensors_of
from huggingface_hub.utils import filter_repo_objects
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get, merge_tensors
from mergekit.options import MergeOptions
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_pave import cli
from mergekit_pave.algebra.emr import RESCALERS, Sums, elect, scale, task_weight, trace
from mergekit_pave.errors import PaveError
from mergekit_pave.methods import emr
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.plugin.opening import open_state
from mergekit_pave.publish import hub
from mergekit_pave.recipe.inputs import inputs
from mergekit_pave.storage import masks as task_masks
from mergekit_pave.storage.masks import TaskMasks
from mergekit_pave.tasks import emr as emr_models
from mergekit_pave.tasks.emr import load_task_model, materialize, task_tensors

MANIFEST = Path("emr", "manifest.json")


def papers_models(base: dict, experts: list[dict], rescaler: str = "tensor_mean") -> list[dict]:
    """Every task's model in float64, as the paper and its authors' code define it."""
    unified, masks, sums = {}, [{} for _ in experts], np.zeros((len(experts), 2))
    for name, origin in base.items():
        origin = origin.double().numpy()
        deltas = [expert[name].double().numpy() - origin for expert in experts]
        flag = np.where(sum(deltas) > 0, 1.0, -1.0)
        agreeing = [np.where(d * flag > 0, np.abs(d), 0) for d in deltas]
        unified[name] = flag * np.max(agreeing, axis=0)
        for t, delta in enumerate(deltas):
            masks[t][name] = delta * flag > 0
            pair = np.array([np.abs(delta).sum(), np.abs(unified[name] * masks[t][name]).sum()])
            sums[t] += pair / (origin.size if rescaler == "tensor_mean" else 1)
    factors = [own / kept if kept else 1.0 for own, kept in sums]
    return [
        {n: o.double().numpy() + factors[t] * masks[t][n] * unified[n] for n, o in base.items()}
        for t in range(len(experts))
    ]


def our_models(base: dict, experts: list[dict], rescaler: str = "tensor_mean") -> list[dict]:
    """The same by our functions, in memory."""
    merged = {name: elect(base[name], [e[name] for e in experts]) for name in base}
    models = []
    for expert in experts:
        traces = {n: trace(base[n], expert[n], merged[n]) for n in base}
        factor = scale(
            (Sums(t.own, t.unified, base[n].numel()) for n, t in traces.items()), rescaler)
        models.append({n: task_weight(base[n], merged[n], t.mask, factor)
                       for n, t in traces.items()})
    return models


def random_models(seed: int, experts: int, dtype=torch.float64, whole: bool = False):
    """State dicts of two tensors; `whole` numbers cancel exactly, again and again."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return ((2 * values).round() if whole else values).to(dtype)

    shapes = {"weight": (7, 5), "bias": (3,)}
    base = {name: draw(*shape) for name, shape in shapes.items()}
    models = [{n: (b + draw(*b.shape)).to(dtype) for n, b in base.items()} for _ in range(experts)]
    return base, models


# --- algebra -------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rescaler", RESCALERS)
@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_task_models_are_the_papers(experts, rescaler, whole):
    for seed in range(5):
        base, models = random_models(seed, experts, whole=whole)
        expected = papers_models(base, models, rescaler)
        for ours, papers in zip(our_models(base, models, rescaler), expected, strict=True):
            for name in base:
                np.testing.assert_allclose(ours[name].numpy(), papers[name], rtol=1e-12)


def test_the_rescalers_differ():
    base, models = random_models(0, 3)
    mean, all_ = (our_models(base, models, r)[0]["weight"] for r in RESCALERS)
    assert not torch.allclose(mean, all_)


def test_a_tie_elects_the_negative_side():
    base = torch.tensor([1.0, 1.0, 1.0])
    models = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([-1.0, 1.0, 4.0])]
    merged = elect(base, models)
    assert merged.tolist() == [-1.0, 1.0, 4.0]
    masks = [trace(base, model, merged).mask.tolist() for model in models]
    assert masks == [[False, False, True], [True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_task_is_exactly_its_fine_tune(dtype):
    base, models = random_models(1, 1, dtype)
    (ours,) = our_models(base, models)
    assert all(torch.equal(ours[name].to(dtype), models[0][name]) for name in base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_election_picks_without_rounding(dtype):
    base, models = random_models(2, 4, dtype)
    wide = {n: b.double() for n, b in base.items()}
    for name in base:
        tensors = [model[name] for model in models]
        merged = elect(base[name], tensors)
        assert merged.dtype == dtype
        assert sum(merged == t for t in (*tensors, base[name])).bool().all()
        assert torch.equal(merged.double(), elect(wide[name], [t.double() for t in tensors]))


def test_models_that_are_the_base_or_alike():
    base, (expert,) = random_models(3, 1, torch.float32)
    same = our_models(base, [expert, expert, expert])
    assert all(torch.equal(model[name], expert[name]) for model in same for name in base)
    still, moved = our_models(base, [base, expert])
    assert all(torch.equal(still[n], base[n]) and torch.equal(moved[n], expert[n]) for n in base)


def test_a_task_that_loses_every_election_is_the_base():
    base = {"w": torch.zeros(4)}
    loser, _ = our_models(base, [{"w": torch.full((4,), -1.0)}, {"w": torch.full((4,), 2.0)}])
    assert torch.equal(loser["w"], base["w"])


def test_tiny_differences_do_not_underflow():
    base = {"w": torch.zeros(2)}
    expert = {"w": torch.tensor([1e-30, -1e-30])}
    (ours,) = our_models(base, [expert])
    assert torch.equal(ours["w"], expert["w"])


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (2, 2, 5), ()])
def test_masks_take_one_bit(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = task_masks.pack(mask)
    assert packed.dtype == torch.uint8 and len(packed) == (mask.numel() + 7) // 8
    assert torch.equal(task_masks.unpack(packed, shape), mask)


# --- merges --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """`trio(kind)` -> a base and three fine-tunes, in float32."""
    made = {}

    def get(kind: str, **more):
        key = (kind, *more.values())
        if key not in made:
            made[key] = make_family(tmp_path_factory.mktemp(kind), kind, experts=3, **more)
        return made[key]

    return get


def experts_of(paths: dict) -> list[dict]:
    return [tensors_of(path) for name, path in paths.items() if name != "base"]


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def merged(trio, tmp_path_factory) -> Path:
    """A finished merge of three tiny Llamas, with mergekit's card and configuration."""
    out = tmp_path_factory.mktemp("emr") / "out"
    merge(emr_config(trio("llama")), out, write_model_card=True, copy_tokenizer=True,
          out_shard_size=20_000)
    return out


@pytest.fixture
def copy(merged, tmp_path) -> Path:
    """A copy of that merge, to be damaged."""
    return shutil.copytree(merged, tmp_path / "copy")


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_every_task_comes_back_from_disk(trio, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(task_masks, "WINDOW", 2_000)
    paths = trio(kind)
    found = merge(emr_config(paths), tmp_path / "out", out_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*"))) > 2
    assert len(list((tmp_path / "out" / "emr").glob("masks-*"))) > 2
    base, experts = tensors_of(paths["base"]), experts_of(paths)
    expected = our_models(base, experts)
    papers = papers_models(base, experts)
    assert equal({n: elect(base[n], [e[n] for e in experts]) for n in base}, found)
    for t in range(3):
        ours = dict(task_tensors(tmp_path / "out", t, base=str(paths["base"])))
        assert ours.keys() == expected[t].keys()
        for name in ours:
            # The sums come back exactly; their order may be another.
            assert torch.allclose(ours[name], expected[t][name], rtol=0, atol=1e-6), name
            np.testing.assert_allclose(ours[name].numpy(), papers[t][name], atol=1e-5)
        model = load_task_model(tmp_path / "out", t, base=str(paths["base"]))
        assert type(model).__name__ == CLASSES[kind]
        state = model.state_dict()
        prefix = "" if next(iter(ours)) in state else "transformer."
        assert all(torch.equal(state[prefix + name], ours[name]) for name in ours)


def test_one_bit_per_parameter_and_task_on_disk(merged):
    sizes = [t.numel() for t in tensors_of(merged).values()]
    manifest = json.loads((merged / MANIFEST).read_text())
    assert len(manifest["tensors"]) == len(sizes)
    files = list((merged / "emr").glob("masks-*.safetensors"))
    stored = {k: t for file in files for k, t in load_file(file).items()}
    assert {t.dtype for t in stored.values()} == {torch.uint8}
    assert sum(t.nbytes for t in stored.values()) == 3 * sum((n + 7) // 8 for n in sizes)
    # The header of a file is all that comes on top.
    assert sum(f.stat().st_size for f in files) < 3 * sum(sizes) / 8 + 200 * len(sizes)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_purified_models_are_merged(trio, texts, tmp_path, kind):
    """`pave_emr` is `emr` applied to models purified beforehand, one by one."""
    paths = trio(kind)
    shared = {"rank_ratio": 0.8, "rank_allocation": "uniform"}
    config = emr_config(paths, "pave_emr", parameters=shared)
    for i, model in enumerate(config["models"]):
        model["parameters"] = {"calibration_dataset": str(texts[i % 2])}
    merge(config, tmp_path / "out", out_shard_size=20_000)
    purified = []
    for i, model in enumerate(config["models"]):
        alone = {**config, "merge_method": "pave_task_arithmetic", "models": [
            {**model, "parameters": {**model["parameters"], "weight": 1.0}}]}
        purified.append(merge(alone, tmp_path / f"purified{i}"))
    base = tensors_of(paths["base"])
    plain = our_models(base, experts_of(paths))[1]
    expected = our_models(base, purified)[1]
    found = dict(task_tensors(tmp_path / "out", "expert1", base=str(paths["base"])))
    for name in base:
        # A mask may flip for single entries, whose task vector differs by rounding.
        assert ((found[name] - expected[name]).abs() > 1e-4).float().mean() < 0.01, name
    name = next(n for n in base if "1." in n and base[n].ndim == 2)
    assert (found[name] - plain[name]).norm() > 0.05 * plain[name].norm()


def test_ratio_one_is_the_plain_method(trio, merged, tmp_path):
    config = emr_config(trio("llama"), "pave_emr", parameters={"rank_ratio": 1.0})
    merge(config, tmp_path / "out", out_shard_size=20_000)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(merged))
    assert (tmp_path / "out" / MANIFEST).read_text() == (merged / MANIFEST).read_text()
    assert equal(tensors_of(tmp_path / "out" / "emr"), tensors_of(merged / "emr"))


def test_bfloat16_models_come_back_exactly(trio, tmp_path):
    paths = trio("llama", dtype=torch.bfloat16)
    merge(emr_config(paths, dtype="bfloat16"), tmp_path / "out")
    expected = our_models(tensors_of(paths["base"]), experts_of(paths))[0]
    found = dict(task_tensors(tmp_path / "out", 0, base=str(paths["base"])))
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    for name in found:
        assert torch.allclose(found[name].float(), expected[name], rtol=2**-8, atol=1e-7), name


@pytest.mark.parametrize("method", ["emr", "pave_emr"])
@pytest.mark.parametrize("dtypes", [{"out_dtype": "bfloat16"}, {"dtype": "bfloat16"}])
def test_rounded_weights_are_understood(trio, texts, tmp_path, method, dtypes):
    """Cast before or after the merge: the task's model is off by little more than one cast."""
    paths = trio("llama")
    config = emr_config(paths, method, **dtypes)
    if method == "pave_emr":
        config["parameters"] = {"rank_ratio": 0.9, "calibration_dataset": str(texts[0])}
    merge(config, tmp_path / "out")
    exact = merge({**config, "dtype": "float32", "out_dtype": "float32"}, tmp_path / "exact")
    base = str(paths["base"])
    found = dict(task_tensors(tmp_path / "out", 2, base=base))
    wide = dict(task_tensors(tmp_path / "exact", 2, base=base))
    for name in exact:
        assert found[name].dtype == torch.bfloat16
        off = (found[name].float() - wide[name]).norm() / wide[name].norm()
        assert off < (2**-7 if dtypes.get("out_dtype") else 2**-4), name


def test_layers_of_slices_are_found_by_their_values(trio, tmp_path):
    paths = trio("llama")
    config = emr_config(paths)
    sources = [{**m, "layer_range": [1, 2]} for m in config.pop("models")]
    sources.append({"model": config["base_model"], "layer_range": [1, 2]})
    merge({**config, "slices": [{"sources": sources}]}, tmp_path / "out")
    found = dict(task_tensors(tmp_path / "out", 0, base=str(paths["base"])))
    names = {name: name.replace("layers.0.", "layers.1.") for name in found}
    assert sum(name != source for name, source in names.items()) == 9
    base, *experts = (
        {name: tensors[source] for name, source in names.items()}
        for tensors in (tensors_of(paths["base"]), *experts_of(paths)))
    expected = our_models(base, experts)[0]
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)


def test_a_task_that_took_no_part_has_the_base(trio, tmp_path):
    paths = trio("llama")
    config = emr_config(paths)
    models = [item["model"] for item in config.pop("models")]
    parts = [(0, 1, models), (1, 2, models[2:])]
    config["slices"] = [
        {"sources": [{"model": model, "layer_range": [first, end]}
                     for model in (*some, config["base_model"])]}
        for first, end, some in parts]
    out = merge(config, tmp_path / "out")
    found = dict(task_tensors(tmp_path / "out", 0, base=str(paths["base"])))
    base, own = tensors_of(paths["base"]), tensors_of(paths["expert0"])
    other = [name for name in out if "layers.1." in name]
    assert sum(not torch.equal(out[name], base[name]) for name in other) >= 7
    assert all(torch.equal(found[name], base[name]) for name in other)
    first = "model.layers.0.mlp.up_proj.weight"
    assert (found[first] - own[first]).norm() < (base[first] - own[first]).norm()


def test_loading_takes_what_transformers_does(trio, merged, tmp_path):
    base = str(trio("llama")["base"])
    config = transformers.AutoConfig.from_pretrained(merged)
    config.rms_norm_eps = 0.25
    model, info = load_task_model(
        merged, 1, base=base, config=config, output_loading_info=True, dtype=torch.bfloat16)
    assert not info["missing_keys"] and model.config.rms_norm_eps == 0.25
    assert model.dtype == torch.bfloat16


def test_a_base_that_differs_in_a_few_rows_is_another(trio, merged, tmp_path):
    other = shutil.copytree(trio("llama")["base"], tmp_path / "other")
    state = tensors_of(other)
    state["model.embed_tokens.weight"][45:47] = 0
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaveError, match="other is not the base .*embed_tokens"):
        dict(task_tensors(merged, 0, base=str(other)))


def test_experts_fused_by_mergekit_are_found_in_the_base(tmp_path):
    """The base's checkpoint has them one by one, as older transformers wrote them."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=94, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        hidden_size=32, intermediate_size=48, num_local_experts=4))
    paths = {}
    for name in ("base", "expert0"):
        paths[name] = tmp_path / name
        model.save_pretrained(paths[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    out = merge(emr_config(paths), tmp_path / "out")
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert fused in out and fused not in tensors_of(paths["base"])
    expected = transformers.AutoModelForCausalLM.from_pretrained(paths["expert0"]).state_dict()
    found = load_task_model(tmp_path / "out", 0, base=str(paths["base"])).state_dict()
    assert equal(found, expected)


def test_a_rearranged_vocabulary_is_kept(trio, tmp_path):
    paths = trio("llama")
    merge(emr_config(paths, tokenizer={"source": "union"}), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    kept = {name for name, tensor in manifest["tensors"].items() if tensor["keeps_base"]}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"}
    merge(emr_config(paths), tmp_path / "plain")
    a, b = (dict(task_tensors(tmp_path / out, 1, base=str(paths["base"])))
            for out in ("out", "plain"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in b)


def test_in_memory_there_are_the_unified_weights_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, models = random_models(5, 3, torch.float32)
    merged = merge_tensors([base["weight"], *(m["weight"] for m in models)], "emr", base_index=0)
    assert torch.equal(merged, elect(base["weight"], [m["weight"] for m in models]))
    assert not list(tmp_path.rglob("emr"))


def method_that_writes(config, folder):
    options = MergeOptions(quiet=True)
    state = open_state(config, inputs(config), folder, options, LoaderOptions.of(options))
    return get("emr").within(state)


def test_threads_write_what_one_thread_writes(trio, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(task_masks, "WINDOW", 1_000)
    paths = trio("llama")
    config = MergeConfiguration.model_validate(emr_config(paths))
    ids = [ModelReference.model_validate(str(path)) for path in paths.values()]
    sources = [tensors_of(path) for path in paths.values()]

    def work(name: str) -> None:
        merge_tensors([s[name] for s in sources], method, ids=ids, base_index=0, name=name)

    method = method_that_writes(config, tmp_path)
    threads = [threading.Thread(target=work, args=(name,)) for name in sources[0]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    method.state.masks.finish()
    one, many = TaskMasks(merged), TaskMasks(tmp_path)
    assert one.tasks == many.tasks == ["expert0", "expert1", "expert2"]
    assert one.tensors.keys() == many.tensors.keys()
    for name in one.tensors:
        assert one.tensors[name].own == many.tensors[name].own
        assert all(torch.equal(one.mask(name, t), many.mask(name, t)) for t in range(3))


def test_a_merge_that_nobody_has_checked_keeps_one_base_and_rescaler(trio, tmp_path):
    paths = trio("llama")
    config = MergeConfiguration.model_validate(emr_config(paths))
    ids = [ModelReference.model_validate(str(path)) for path in paths.values()]

    def work(base: int, rescaler: str) -> None:
        method = method_that_writes(config, tmp_path / "out")
        for i, way in enumerate(("global", rescaler)):
            merge_tensors([torch.randn(3) for _ in ids], method, ids=ids, base_index=i * base,
                          name=str(i), parameters={"rescaler": way})

    work(0, "global")
    with pytest.raises(PaveError, match="one base for the whole model.*base_model of the slice"):
        work(1, "global")
    with pytest.raises(PaveError, match="rescaler must be one value for the whole model"):
        work(0, "tensor_mean")
    assert not (tmp_path / "out" / "emr").exists()


def test_the_end_of_a_merge_says_what_it_wrote(trio, tmp_path, capsys):
    merge(emr_config(trio("llama")), tmp_path / "out", quiet=False)
    said = capsys.readouterr().err
    assert "masks for 3 tasks" in said and f"materialize {tmp_path / 'out'} TASK DIR" in said


# --- folders -------------------------------------------------------------------------------


def test_a_materialised_task_is_an_ordinary_model(trio, merged, tmp_path):
    materialize(merged, "expert2", tmp_path / "task")
    files = {file.name for file in (tmp_path / "task").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}
    expected = dict(task_tensors(merged, "expert2"))
    assert equal(tensors_of(tmp_path / "task"), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "task")
    loaded = load_task_model(merged, "expert2")
    assert equal(model.state_dict(), loaded.state_dict())
    assert not equal(model.state_dict(), load_task_model(merged, "expert0").state_dict())
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "task")("w1 w2",
                                                                        return_tensors="pt")
    ids = text["input_ids"]
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id == 2
    half = load_task_model(merged, "expert2", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_the_rescaler_can_be_chosen_afterwards(trio, merged, tmp_path):
    paths = trio("llama")
    merge(emr_config(paths, parameters={"rescaler": "global"}), tmp_path / "out")
    base = str(paths["base"])
    at_merge = dict(task_tensors(tmp_path / "out", 0, base=base))
    assert equal(at_merge, dict(task_tensors(merged, 0, rescaler="global")))
    assert equal(dict(task_tensors(tmp_path / "out", 0, base=base, rescaler="tensor_mean")),
                 dict(task_tensors(merged, 0)))
    expected = papers_models(tensors_of(paths["base"]), experts_of(paths), "global")[0]
    for name in at_merge:
        np.testing.assert_allclose(at_merge[name].numpy(), expected[name], atol=1e-5)


def test_the_command(merged, tmp_path):
    def invoke(*arguments):
        result = CliRunner().invoke(cli.main, ["materialize", *map(str, arguments)])
        return result.exit_code, result.stdout, result.stderr

    code, out, _ = invoke(merged, "expert0", tmp_path / "task", "--rescaler", "global")
    assert code == 0 and out == f"{tmp_path / 'task'}: the model of expert0.\n"
    assert equal(tensors_of(tmp_path / "task"), dict(task_tensors(merged, 0, rescaler="global")))
    code, out, err = invoke(merged, "icd", tmp_path / "other")
    assert code == 1 and not out and err.count("\n") == 1
    assert "no task called 'icd'" in err and "0 (expert0), 1 (expert1), 2 (expert2)" in err
    code, _, err = invoke(merged, "0", tmp_path / "task")
    assert code == 1 and "exists already" in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["task"]


def test_only_public_names_are_written(merged, trio):
    text = (merged / MANIFEST).read_text()
    assert str(trio("llama")["base"].parent) not in text and str(Path.home()) not in text
    assert json.loads(text)["base"] == {"id": "base", "hub": None}
    for file in (merged / "emr").glob("masks-*"):
        with safe_open(file, "pt") as opened:
            assert not opened.metadata()


def test_a_push_takes_the_masks_along(merged):
    files = [str(file.relative_to(merged)) for file in merged.rglob("*") if file.is_file()]
    pushed = set(filter_repo_objects(files, ignore_patterns=hub.NOT_PUBLISHED))
    assert pushed == set(files) and str(MANIFEST) in pushed


def test_a_published_merge_names_its_base(merged, trio, monkeypatch, tmp_path, copy):
    """Merge and base by their Hub ids, as someone else would use them."""
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["base"] = {"id": "org/base", "hub": "org/base"}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    (copy / "mergekit_config.yml").unlink()
    monkeypatch.setattr(emr_models, "snapshot_download", lambda *a, **k: str(copy))
    monkeypatch.setattr(emr_models, "read_config", lambda *a: None)
    monkeypatch.setattr(ModelReference, "local_path", lambda *a, **k: str(trio("llama")["base"]))
    assert equal(dict(task_tensors("me/merged", 1)), dict(task_tensors(merged, 1)))


@pytest.mark.parametrize("given", [{}, {"trust_remote_code": True, "cache_dir": "elsewhere"}])
def test_where_and_how_the_base_is_loaded(merged, trio, monkeypatch, copy, given):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, "base": {"id": "x", "hub": "org/x"}}))
    seen, trusted, cache = [], given.get("trust_remote_code", False), given.get("cache_dir")
    expected = load_task_model(merged, 1).state_dict()

    def fetched(*_, cache_dir, **more):
        seen.append(cache_dir)
        return str(copy)

    def located(reference, cache_dir=None, **more):
        seen.append(cache_dir)
        assert str(reference) == "org/x@v2"
        return str(trio("llama")["base"])

    def configured(repo, trust_remote_code, **more):
        assert trust_remote_code is trusted
        return real(repo, **more)

    real = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", configured)
    monkeypatch.setattr(emr_models, "snapshot_download", fetched)
    monkeypatch.setattr(ModelReference, "local_path", located)
    monkeypatch.setattr(
        emr_models, "read_config", lambda _, options: seen.append(options.trust_remote_code))
    model = load_task_model("me/merged", 1, base="org/x@v2", **given)
    assert equal(model.state_dict(), expected)
    assert seen == [cache, trusted, cache]


# --- what goes wrong -----------------------------------------------------------------------


def refused(words: str, function, *arguments, **more) -> None:
    with pytest.raises(PaveError) as caught:
        list(function(*arguments, **more) or ())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_merge_leaves_the_earlier_masks(trio, tmp_path, monkeypatch):
    monkeypatch.setattr(task_masks, "WINDOW", 1_000)
    config, out = emr_config(trio("llama")), tmp_path / "out"
    merge(config, out)
    before = {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 15:
            assert list(tmp_path.glob("*/.merging-*/*/emr/masks-*"))
            raise KeyboardInterrupt
        return elect(*arguments)

    monkeypatch.setattr(emr, "elect", failing)
    for folder in (out, tmp_path / "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            merge(config, folder, out_shard_size=1_000)
    assert before == {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert not (tmp_path / "new").exists()


def test_a_killed_merge_leaves_nothing_that_counts(trio, tmp_path):
    paths = trio("llama")
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(emr_config(paths)))
    code = (
        "import os, sys, yaml\n"
        "from mergekit.merge import run_merge, MergeOptions\n"
        "from mergekit.config import MergeConfiguration\n"
        "from mergekit_pave.storage import masks as task_masks\n"
        "task_masks.WINDOW = 1_000\n"
        "flush = task_masks.Recorder._flush\n"
        "def dying(self):\n"
        "    flush(self)\n"
        "    if self._files == 3: os._exit(9)\n"
        "task_masks.Recorder._flush = dying\n"
        "config = MergeConfiguration.model_validate(yaml.safe_load(open('merge.yml')))\n"
        "run_merge(config, 'out', MergeOptions(quiet=True))\n")
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 9
    out = tmp_path / "out"
    (left,) = out.glob(".merging-*/out/emr")
    assert len(list(left.iterdir())) == 3
    refused("has no task masks", task_tensors, out, 0)
    merge(emr_config(paths), out)
    assert not list(out.glob(".merging-*"))
    names = {file.name for file in (out / "emr").iterdir()}
    assert names == {"manifest.json", "masks-00000.safetensors"}


def test_another_merge_replaces_the_masks(trio, tmp_path):
    paths = trio("llama")
    two = {name: paths[name] for name in ("base", "expert2", "expert0")}
    merge(emr_config(paths), tmp_path / "out")
    merge(emr_config(two), tmp_path / "out")
    merge(emr_config(two), tmp_path / "fresh")
    base = str(paths["base"])
    assert TaskMasks(tmp_path / "out").tasks == ["expert2", "expert0"]
    assert equal(dict(task_tensors(tmp_path / "out", "expert2", base=base)),
                 dict(task_tensors(tmp_path / "fresh", 0, base=base)))
    ties = emr_config(two, "ties")
    for model in ties["models"]:
        model["parameters"] = {"weight": 0.5}
    merge(ties, tmp_path / "out")
    assert not (tmp_path / "out" / "emr").exists()


def test_another_programs_folder_is_left_alone(trio, tmp_path):
    paths = trio("llama")
    theirs = tmp_path / "out" / "emr" / "manifest.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"kind": "records"}')
    average = {"merge_method": "linear", "dtype": "float32", "models": [
        {"model": str(paths[name]), "parameters": {"weight": 1}}
        for name in ("expert0", "expert1")]}
    merge(average, tmp_path / "out")
    assert theirs.read_text() == '{"kind": "records"}'


def test_materialising_leaves_a_sibling_alone(merged, tmp_path):
    """`task.2` is being written while `task` appears; what a killed process left goes."""
    busy, left = tmp_path / ".task.2.77.tmp", tmp_path / ".task.77.tmp"
    busy.mkdir()
    left.mkdir()
    materialize(merged, 0, tmp_path / "task")
    assert busy.is_dir() and not left.exists()


def test_materialising_is_all_or_nothing(merged, tmp_path, monkeypatch):
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        def failing(self, error=error):
            raise error

        monkeypatch.setattr(emr_models.TensorWriter, "finalize", failing)
        with pytest.raises((KeyboardInterrupt, PaveError)) as caught:
            materialize(merged, 0, tmp_path / "task")
        assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in str(caught.value)


def test_merges_without_masks_and_unknown_tasks(trio, merged, tmp_path):
    refused("has no task masks", task_tensors, trio("llama")["base"], 0)
    refused("no model folder", load_task_model, tmp_path / "nowhere", 0)
    refused("can be reached", load_task_model, "nobody/nothing", 0)
    refused("0 (expert0), 1 (expert1)", load_task_model, merged, "expert3")
    refused("no task called '3'", load_task_model, merged, 3)
    refused("no task called '-1'", load_task_model, merged, -1)
    refused("rescaler must be one of", load_task_model, merged, 0, rescaler="mean")


def test_models_of_one_name_go_by_number(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, "tasks": ["a/x", "b/x", "0"]}))
    masks = TaskMasks(copy)
    assert [masks.task(name) for name in ("a/x", "b/x", "0", 0, 1, "2")] == [0, 1, 2, 0, 1, 2]
    refused("Several tasks are called 'x'", masks.task, "x")


def test_another_base_is_refused(trio, merged, copy, tmp_path):
    paths = trio("llama")
    refused("is not the base of this merge, base (first difference: ", task_tensors, merged, 0,
            base=str(paths["expert0"]))
    refused("There is no model folder", task_tensors, merged, 0, base=str(tmp_path / "nowhere"))
    configuration = copy / "mergekit_config.yml"
    configuration.write_text(configuration.read_text().replace(str(paths["base"]), "base"))
    refused("name its folder with --base", task_tensors, copy, 0)
    configuration.unlink()
    refused("name its folder with --base", task_tensors, copy, 0)
    assert equal(dict(task_tensors(copy, 0, base=str(paths["base"]))),
                 dict(task_tensors(merged, 0)))
    assert not (tmp_path / "task").exists()


def test_damaged_files(copy, merged):
    (file,) = (copy / "emr").glob("masks-*")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused("are damaged (masks-00000.safetensors: wrong checksum", task_tensors, copy, 2)
    file.write_bytes(good[:-100])
    refused("are damaged (masks-00000.safetensors: ", task_tensors, copy, 0)
    file.unlink()
    refused("are damaged (masks-00000.safetensors: ", task_tensors, copy, 0)
    file.write_bytes(good)
    text = (copy / MANIFEST).read_text()
    for bad in (text[:-9], "[]", "{}", text.replace('"shape"', '"form"')):
        (copy / MANIFEST).write_text(bad)
        refused("damaged", task_tensors, copy, 0)
    for new in ('"../emr/masks-', '"other/masks-'):
        (copy / MANIFEST).write_text(text.replace('"masks-', new))
        refused("damaged", task_tensors, copy, 0)
    for key, value in (("dtype", "load"), ("own", [1.0])):
        manifest = json.loads(text)
        next(iter(manifest["tensors"].values()))[key] = value
        (copy / MANIFEST).write_text(json.dumps(manifest))
        refused("damaged", task_tensors, copy, 0)
    for value in ("floaty", "int3", 32, ["float32"]):
        (copy / MANIFEST).write_text(json.dumps({**json.loads(text), "dtype": value}))
        refused(f"task masks in {copy / 'emr'} are damaged (manifest.json: ", load_task_model, copy,
                0)
    manifest = json.loads(text)
    next(iter(manifest["tensors"].values()))["dtype"] = "quint8"
    (copy / MANIFEST).write_text(json.dumps(manifest))
    refused("are damaged (manifest.json: ", task_tensors, copy, 0)
    (copy / MANIFEST).write_text(text.replace('"format": 2', '"format": 1'))
    refused("not from this version", task_tensors, copy, 0)
    (copy / MANIFEST).write_text(text)
    assert equal(dict(task_tensors(copy, 0)), dict(task_tensors(merged, 0)))
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    whole = load_file(shard)
    save_file({name: t[:1].clone() for name, t in whole.items()}, shard)
    refused("has another shape than its task masks", task_tensors, copy, 0)
    shard.unlink()
    refused("holds no finished merge", task_tensors, copy, 0)


def test_configurations_that_cannot_be(trio, tmp_path):
    paths = trio("llama")
    config = emr_config(paths, parameters={"rescaler": "mean"})
    refused("must be one of tensor_mean, global; got 'mean'", merge, config, tmp_path / "a")
    config["parameters"] = {"rescaler": [{"filter": "mlp", "value": "global"},
                                         {"value": "tensor_mean"}]}
    refused("rescaler must be one value", merge, config, tmp_path / "b")
    config = emr_config(paths)
    sources = [{**m, "layer_range": [0, 2]} for m in config.pop("models")]
    config["slices"] = [{"sources": sources, "base_model": str(paths["expert0"])}]
    refused("remove the base_model of the slice", merge, config, tmp_path / "c")
    broken = tmp_path / "broken"
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["expert0"])
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(broken)
    refused("model.norm.weight of", merge, emr_config({**paths, "expert0": broken}), tmp_path / "d")
    for out in "abcd":
        assert not (tmp_path / out / "emr").exists()
