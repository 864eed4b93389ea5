"""What mergekit plans against what the checkpoints hold, with tiny models of real classes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import OPTIONS, merge, tensors_of
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file, save_file

from mergekit_pave.check import check
from mergekit_pave.errors import PaveError
from mergekit_pave.models.planned import completed
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.plugin import register

register()
COMMON = dict(vocab_size=94, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
              intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
              max_position_embeddings=64)
MOE = dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
           moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1, topk_group=1,
           kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              image_size=16, patch_size=4)
KINDS = {
    "LlamaForCausalLM": dict(**COMMON, attention_bias=True, mlp_bias=True),
    "StableLmForCausalLM": dict(**COMMON, use_qkv_bias=True, qk_layernorm=True),
    "DeepseekV3ForCausalLM": dict(**COMMON, **MOE, q_lora_rank=16),
    "DeepseekV2ForCausalLM": dict(**COMMON, **MOE, q_lora_rank=None),
    "Qwen3MoeForCausalLM": dict(**COMMON, num_experts=4, num_experts_per_tok=2, head_dim=8,
                                moe_intermediate_size=16, mlp_only_layers=[0]),
    "T5ForConditionalGeneration": dict(vocab_size=94, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                                       num_heads=4, decoder_start_token_id=0),
    "GPTNeoXForCausalLM": COMMON,
    "BertForMaskedLM": COMMON,
    "CLIPModel": dict(text_config=dict(**COMMON), vision_config=VISION),
    "Qwen2VLForConditionalGeneration": dict(
        text_config=dict(**COMMON, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2,
                           patch_size=4)),
}


def family(folder: Path, kind: str, **settings) -> list[Path]:
    """A base and two fine-tunes of a class."""
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings))
    paths = [folder / name for name in ("base", "e0", "e1")]
    for path in paths:
        model.save_pretrained(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return paths


def llamas(folder: Path) -> list[Path]:
    return family(folder, "LlamaForCausalLM", **COMMON)


def recipe(paths: list[Path], method: str = "tsv_m", **more) -> dict:
    return {"merge_method": method, "base_model": str(paths[0]),
            "models": [{"model": str(path)} for path in paths[1:]], **more}


def errors(raw: dict, options: LoaderOptions = OPTIONS) -> list[str]:
    return [str(f) for f in check(raw, options) if f.level == "error"]


def rewrite(path: Path, change) -> None:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def sharded(path: Path, count: int = 3) -> list[Path]:
    """The folder's weights in several files with an index."""
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    places = {name: files[i % count] for i, name in enumerate(sorted(state))}
    for file in files:
        part = {name: state[name] for name, place in places.items() if place == file}
        save_file(part, path / file, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": places})
    (path / "model.safetensors.index.json").write_text(index)
    return [path / file for file in files]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(tmp_path, kind):
    """Definitions of mergekit that do not fit, and mixtures of dense layers and experts."""
    paths = family(tmp_path, kind, **KINDS[kind])
    assert errors(recipe(paths)) == []
    merged, base, tuned = (merge(recipe(paths), tmp_path / "out"), tensors_of(paths[0]),
                           tensors_of(paths[1]))
    assert merged.keys() >= base.keys()
    same = [name for name, tensor in base.items() if torch.equal(tensor, merged[name])
            and not torch.equal(tensor, tuned[name])]
    assert not same
    model, info = getattr(transformers, kind).from_pretrained(
        tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]


FILES = {
    "missing shard": (lambda p: sharded(p)[2].unlink(), "00003-of-00003.safetensors is missing"),
    "cut shard": (lambda p: cut(sharded(p)[1]), "00002-of-00003.safetensors is cut short"),
    "no index": (lambda p: (sharded(p), (p / "model.safetensors.index.json").unlink()),
                 "shards of weights such as model-00001.*without their index"),
    "pointer": (lambda p: (p / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "model.safetensors is a Git LFS pointer"),
    "tokenizer": (lambda p: (p / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "tokenizer.json is a Git LFS pointer"),
    "integers": (lambda p: rewrite(p, lambda s: {
        **s, "model.norm.weight": s["model.norm.weight"].to(torch.int8)}),
        "model.norm.weight of .* holds integers"),
    "scaled": (lambda p: rewrite(p, lambda s: {
        **s, "model.norm.weight": s["model.norm.weight"].to(torch.float8_e4m3fn),
        "model.norm.weight_scale_inv": torch.ones(1)}),
        r"model.norm.weight of .* holds numbers that need a scale \(F8_E4M3\)"),
    "packed": (lambda p: rewrite(p, lambda s: {
        **without(s, "model.norm.weight"), "model.norm.qweight": torch.ones(4, dtype=torch.int32)}),
        "model.norm.qweight, which .* those are quantised weights"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no weights"),
    "prefix": (lambda p: rewrite(p, lambda s: {f"module.{k}": v for k, v in s.items()}),
               "take the prefix `module.` off"),
    "foreign head": (lambda p: rewrite(p, lambda s: {
        **without(s, "lm_head.weight"), "text.lm_head.weight": s["lm_head.weight"]}),
        "no weights for lm_head.weight .* it has text.lm_head.weight"),
    "one tensor": (lambda p: rewrite(p, lambda s: without(s, "model.norm.weight")),
                   "lacks 1 of the weights .* model.norm.weight"),
    "index lies": (lambda p: other_file(p), "lacks .* which .* says is in it"),
    "outside": (lambda p: other_file(p, "../x.safetensors"), "names files outside its folder"),
    "two": (lambda p: shutil.copy(p.parent / "e1" / "model.safetensors", sharded(p)[0].parent),
            "holds the weights of two models"),
    "size": (lambda p: rewrite(p, lambda s: {**s, "model.norm.weight": torch.ones(16)}),
             r"is \(16,\), and by its config \(32,\)"),
    "another format": (lambda p: (p / "model.safetensors").rename(p / "consolidated.safetensors"),
                       "has no weights that mergekit reads .* only consolidated"),
    "inside": (lambda p: in_pickle(p, lambda state: {"state_dict": state}), "no plain state"),
    "pickle": (lambda p: pickled(p), "is cut short, damaged, or holds more than tensors"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


def other_file(path: Path, name: str | None = None) -> None:
    files = sharded(path)
    index = path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first = min(raw["weight_map"])
    raw["weight_map"][first] = name or files[1].name
    index.write_text(json.dumps(raw))


class Harmful:
    def __reduce__(self):
        return (print, ("ran",))


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save({"x": Harmful()}, path / "pytorch_model.bin")


def in_pickle(path: Path, change, zipped: bool = True) -> None:
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(change(state), path / "pytorch_model.bin",
               _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_pickle_of_an_old_torch(tmp_path, lazy):
    paths = llamas(tmp_path)
    expected = merge(recipe(paths), tmp_path / "expected")
    in_pickle(paths[1], dict, zipped=False)
    assert errors(recipe(paths)) == []
    if lazy:
        with pytest.raises(PaveError, match="pytorch_model.bin .* --lazy-unpickle does not read"):
            merge(recipe(paths), tmp_path / "out", lazy_unpickle=True)
        return
    for name, tensor in merge(recipe(paths), tmp_path / "out").items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_work(tmp_path, case, which, capfd):
    paths = llamas(tmp_path)
    harm, words = FILES[case]
    harm(paths[which])
    found = errors(recipe(paths))
    assert len(found) == 1
    assert found[0].startswith("base_model" if which == 0 else "models[0]")
    with pytest.raises(PaveError, match=words):
        merge(recipe(paths), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "ran" not in capfd.readouterr().out


def test_a_bias_that_only_a_fine_tune_has(tmp_path):
    paths = llamas(tmp_path / "a")
    biased = family(tmp_path / "b", "LlamaForCausalLM", **COMMON, attention_bias=True)
    found = errors(recipe([paths[0], biased[1]]))
    assert len(found) == 1 and "the base has no tensors of those names" in found[0]
    assert "bias" in found[0]


def test_a_crime_is_planned_by_what_the_base_has(tmp_path):
    """mergekit's definition of the fine-tune has biases that the base lacks."""
    paths = llamas(tmp_path / "a")
    biased = family(tmp_path / "b", "Qwen2ForCausalLM", **COMMON, num_key_value_heads=4)
    merged = merge(recipe([paths[0], biased[1]]), tmp_path / "out", allow_crimes=True)
    assert merged.keys() == tensors_of(paths[0]).keys()


def test_what_only_the_base_lacks_is_refused(tmp_path):
    """mergekit's definition calls it optional, and mergekit then misses it in the base."""
    settings = {key: COMMON[key] for key in ("vocab_size", "pad_token_id", "bos_token_id",
                                             "eos_token_id", "max_position_embeddings")}
    paths = family(tmp_path, "BartForConditionalGeneration", **settings, d_model=32,
                   encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
                   encoder_attention_heads=4, decoder_attention_heads=4)
    assert errors(recipe(paths)) == []
    rewrite(paths[0], lambda s: without(s, "final_logits_bias"))
    (found,) = errors(recipe(paths))
    assert "final_logits_bias" in found


def test_a_shared_embedding_under_the_name_of_one_that_is_tied_to_it(tmp_path):
    paths = family(tmp_path, "T5ForConditionalGeneration", **KINDS["T5ForConditionalGeneration"])
    for path in paths:
        rewrite(path, lambda s: {**without(s, "shared.weight"),
                                 "encoder.embed_tokens.weight": s["shared.weight"]})
    assert errors(recipe(paths)) == []
    assert "encoder.embed_tokens.weight" in merge(recipe(paths), tmp_path / "out")


def test_harmless_buffers_are_not_missed(tmp_path):
    """Old checkpoints hold rotary frequencies and a stored copy of a tied head."""
    paths = family(tmp_path, "LlamaForCausalLM", **COMMON, tie_word_embeddings=True)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(paths[1], lambda s: {**s, name: torch.ones(4)})
    rewrite(paths[2], lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].clone()})
    assert errors(recipe(paths)) == []
    assert name not in merge(recipe(paths), tmp_path / "out")


def test_a_tied_head_that_only_the_base_stores_is_merged(tmp_path):
    paths = family(tmp_path, "LlamaForCausalLM", **COMMON, tie_word_embeddings=True,
                   attention_bias=True)
    rewrite(paths[0], lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].clone()})
    merged = merge(recipe(paths, "tsv_m"), tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_a_head_that_one_fine_tune_trained_apart(tmp_path):
    """The base ties its head, and the merge's differs: its config must not tie it."""
    paths = family(tmp_path, "LlamaForCausalLM", **COMMON, tie_word_embeddings=True)
    head = torch.randn(94, 32)
    rewrite(paths[1], lambda s: {**s, "lm_head.weight": head.clone()})
    config = json.loads((paths[1] / "config.json").read_text())
    (paths[1] / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    merged = merge(recipe(paths), tmp_path / "out")
    other = tensors_of(paths[2])["model.embed_tokens.weight"]
    assert torch.allclose(merged["lm_head.weight"], (head + other) / 2, atol=1e-6)
    assert not torch.allclose(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not transformers.AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings


def test_slices_of_a_model_planned_by_names(tmp_path):
    paths = family(tmp_path, "LlamaForCausalLM", **COMMON, attention_bias=True)
    sources = [{"model": str(path), "layer_range": [0, 1]} for path in paths]
    raw = {"merge_method": "tsv_m", "base_model": str(paths[0]), "slices": [{"sources": sources}]}
    merged = merge(raw, tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.bias" in merged
    assert not [name for name in merged if "layers.1." in name]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 1


def test_the_output_is_compared_with_the_base(tmp_path):
    paths = llamas(tmp_path)
    config = MergeConfiguration.model_validate(recipe(paths))
    shutil.copytree(paths[1], tmp_path / "out")
    completed(tmp_path / "out", config, OPTIONS)
    rewrite(tmp_path / "out", lambda s: without(s, "model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(PaveError, match="lacks .* model.layers.1.mlp.up_proj.weight"):
        completed(tmp_path / "out", copy.deepcopy(config), OPTIONS)


def test_an_adapter_with_added_tokens(tmp_path):
    peft = pytest.importorskip("peft")
    paths = llamas(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(paths[0])
    model.resize_token_embeddings(97)
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    options = LoaderOptions(lora_merge_cache=str(tmp_path / "copies"))
    found = errors(recipe([paths[0], Path(f"{paths[1]}+{tmp_path / 'adapter'}")]), options)
    assert len(found) == 1
    assert "(97, 32)" in found[0] and "resize_token_embeddings" in found[0]
