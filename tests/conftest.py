"""Tiny models of real architectures, fine-tuned by chance, with real tokenizers and data."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Matrices of 32 columns: a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def write_tokenizer(folder: Path, padding_side: str = "right") -> None:
    """A word-level tokenizer of 94 tokens that frames every text with <s> and </s>."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", padding_side=padding_side, model_max_length=64,
    ).save_pretrained(folder)


def write_texts(path: Path, rows: int = 60, seed: int = 0) -> Path:
    """A .jsonl file of texts of 3 to 20 words, drawn so that words are correlated."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            start = draw.randrange(60)
            words = [WORDS[start + draw.randrange(20)] for _ in range(draw.randint(3, 20))]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def _config(kind: str):
    common = dict(vocab_size=94, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
                  intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "llama":
        return transformers.LlamaConfig(**common, num_key_value_heads=2,
                                        max_position_embeddings=64)
    if kind == "roberta":
        return transformers.RobertaConfig(**common, max_position_embeddings=80, num_labels=3)
    if kind == "deberta":
        return transformers.DebertaV2Config(
            **common, max_position_embeddings=64, num_labels=3, relative_attention=True,
            pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=False)
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=94, n_embd=32, n_layer=2, n_head=4,
                                       n_positions=64, bos_token_id=1, eos_token_id=2)
    if kind == "t5":
        return transformers.T5Config(vocab_size=94, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                                     num_heads=4, decoder_start_token_id=0,
                                     feed_forward_proj="gated-gelu")
    if kind == "bert":
        return transformers.BertConfig(**common, max_position_embeddings=64)
    if kind == "vit":
        return transformers.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4, num_labels=3)
    raise KeyError(kind)


CLASSES = {
    "llama": "LlamaForCausalLM",
    "roberta": "RobertaForSequenceClassification",
    "deberta": "DebertaV2ForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertModel",
    "vit": "ViTForImageClassification",
}


def make_family(folder: Path, kind: str, experts: int = 2, seed: int = 0, dtype=torch.float32,
                **save) -> dict[str, Path]:
    """A base and its fine-tunes: `{"base": ..., "expert0": ..., ...}`."""
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[kind])(_config(kind))
    # Initial weights are nearly isotropic; a spread spectrum gives purification a gap to find.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                scale = torch.logspace(0.5, -0.5, parameter.shape[1])
                # T5 does not scale its attention scores: larger weights would saturate them.
                parameter.mul_(scale if kind == "t5" else 4 * scale)
    paths = {"base": folder / "base"}
    _save(model, paths["base"], kind, dtype, **save)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i in range(experts):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(base[name] + 0.1 * base[name].std() * torch.randn_like(p))
        paths[f"expert{i}"] = folder / f"expert{i}"
        _save(model, paths[f"expert{i}"], kind, dtype, **save)
    return paths


def _save(model, folder: Path, kind: str, dtype, **save) -> None:
    import copy

    if kind == "vit":  # see test_names_of_an_older_transformers_are_refused
        save = {"save_original_format": False, **save}
    copy.deepcopy(model).to(dtype).save_pretrained(folder, **save)
    if kind == "vit":
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        write_tokenizer(folder)


def recipe(paths: dict[str, Path], data: list[Path], method: str = "pave_task_arithmetic",
           **parameters) -> dict:
    """A merge of both fine-tunes as its YAML reads; `parameters` are the global ones."""
    models = [
        {"model": str(paths[f"expert{i}"]),
         "parameters": {"weight": 0.5, "calibration_dataset": str(data[i])}}
        for i in range(2)
    ]
    return {"merge_method": method, "base_model": str(paths["base"]), "models": models,
            "parameters": {"rank_ratio": 0.9, "num_calibration_samples": 20, **parameters}}


def cached_repository(folder: Path) -> Path:
    """A repository as the Hub's cache has it; returns the folder for its files."""
    snapshot = folder / "snapshots" / ("0" * 40)
    for made in (snapshot, folder / "refs"):
        made.mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return snapshot


def write_images(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """A folder of small PNG images."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """`families(kind)` -> paths of a tiny base and two fine-tunes, made once per session."""
    made: dict[str, dict[str, Path]] = {}

    def get(kind: str) -> dict[str, Path]:
        if kind not in made:
            made[kind] = make_family(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> list[Path]:
    """Two different .jsonl files."""
    folder = tmp_path_factory.mktemp("texts")
    return [write_texts(folder / f"{i}.jsonl", seed=i) for i in range(2)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "cache"))
