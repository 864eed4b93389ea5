"""What several test modules share: tiny models, data, merges, and independent formulas."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import socket
from pathlib import Path

import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_pave import cli
from mergekit_pave.algebra.second_moment import SecondMoment, fold, unfold
from mergekit_pave.calibration.processes import Workers
from mergekit_pave.calibration.samples import load_samples
from mergekit_pave.check import check
from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions, ModelSource
from mergekit_pave.recipe.parameters import CalibrationSpec
from mergekit_pave.recipe.reading import read_yaml
from mergekit_pave.storage.covariances import CovarianceStore, StoreWriter, Weight

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
    if kind == "vit":  # see test_names_of_an_older_transformers
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


MERGE_OPTIONS = dict(quiet=True, copy_tokenizer=False, write_model_card=False)


def merge(config: dict, out: Path, **options) -> dict[str, torch.Tensor]:
    """Run a merge and return the tensors it wrote."""
    text = yaml.safe_dump(config)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out),
              MergeOptions(**{**MERGE_OPTIONS, "random_seed": 0, **options}), config_source=text)
    return tensors_of(out)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def config_of(paths: dict, method: str, data: list[Path], experts: int = 2, **shared) -> dict:
    parameters = {"weight": 0.7}
    if not method.endswith(("task_arithmetic", "sce")):
        parameters["density"] = 0.6
    if method.endswith("sce"):
        parameters = {}
    models = []
    for i in range(experts):
        own = {"calibration_dataset": str(data[i % len(data)])} if method[:5] == "pave_" else {}
        models.append({"model": str(paths[f"expert{i}"]), "parameters": {**parameters, **own}})
    return {"merge_method": method, "base_model": str(paths["base"]), "models": models,
            "parameters": shared, "dtype": "float32"}


def papers_formula(weight: torch.Tensor, covariance: torch.Tensor, ratio: float) -> torch.Tensor:
    """`SVD_r(W C_e) C_e^-1` in float64, as the paper writes it."""
    w, c = weight.double(), covariance.double()
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    u, s, v = torch.linalg.svd(w @ c, full_matrices=False)
    keep = len(s) - int((1 - ratio) * len(s) + 0.5 + 1e-9)
    return (u[:, :keep] * s[:keep]) @ v[:keep] @ torch.linalg.inv(c)


def source_of(path: Path) -> ModelSource:
    return ModelSource(str(path), path.name, str(path))


def spec_of(data: Path, **changes) -> CalibrationSpec:
    return CalibrationSpec(**{"dataset": str(data), "num_samples": 40, **changes})


def reference(path: Path, kind: str, spec: CalibrationSpec) -> dict[str, torch.Tensor]:
    """Second moments by weight name, float64, one unpadded sequence at a time, by plain hooks."""
    model = getattr(transformers, CLASSES[kind]).from_pretrained(path, dtype=torch.float64)
    samples = load_samples(spec, path, model.config)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def keep(name):
        def hook(module, args):
            rows = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_pre_hook(keep(f"{name}.weight"))
    model.eval()
    with torch.no_grad():
        for item in samples.items:
            inputs = {key: value[None] for key, value in item.items()}
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].double()
            model(**inputs)
    return {name: sums[name] / counts[name] for name in sums}


def worst(store, expected: dict[str, torch.Tensor]) -> float:
    """Largest relative error over all weights of the store."""
    return max(
        ((store.covariance(w.site).double() - expected[name]).norm() / expected[name].norm()).item()
        for name, w in store.weights.items()
    )


def invoke(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


# What a manifest says at least.
ABOUT = {
    "model": {"id": "expert", "revision": None, "digest": "0"},
    "data": {"dataset": "openai/gsm8k", "local": False, "tokens": 7},
}


def mean_of(moment: SecondMoment) -> torch.Tensor:
    """The second moment `(width, width)` as a store gives it back."""
    return unfold(fold(moment.total).div_(moment.count))


def add_window(writer: StoreWriter, covariances: dict[str, tuple[torch.Tensor, int]]) -> None:
    """Write one window: site -> (covariance `(width, width)`, rows)."""
    moments = {}
    for name, (covariance, rows) in covariances.items():
        moments[name] = SecondMoment(len(covariance))
        moments[name].sum, moments[name].count = covariance * rows, rows
    writer.take(moments)


def make_store(folder: Path, model: str = "expert", dataset: str = "openai/gsm8k",
               local: bool = False, rows: int = 640, width: int = 64) -> CovarianceStore:
    """A store of one site, as `calibrate` would write it."""
    writer = StoreWriter(folder, "run")
    add_window(writer, {"a.weight": (torch.eye(width), rows)})
    weight = Weight("a.weight", (8, width), False, "float32")
    return writer.finish(
        {"a.weight": (weight, torch.zeros(512))}, {"lm_head.weight": "vocabulary layer"},
        {"model": {"id": model, "revision": None, "digest": "0"},
         "data": {"dataset": dataset, "local": local, "config": "main", "split": "train",
                  "columns": ["text"], "seed": 42, "requested": 128, "used": 100,
                  "tokens": 12345, "rows": "hash-of-rows", "digest": "hash-of-data"},
         "versions": {}})


def emr_config(paths: dict, method: str = "emr", **more) -> dict:
    models = [{"model": str(path)} for name, path in paths.items() if name != "base"]
    return {"merge_method": method, "base_model": str(paths["base"]), "models": models,
            "dtype": "float32", **more}


OPTIONS = LoaderOptions()


def errors(raw, options=OPTIONS, allowed=None) -> list[str]:
    """The errors, after a round trip through the text that a user would have written."""
    raw = read_yaml(yaml.safe_dump(raw))
    return [str(f) for f in check(raw, options, allowed) if f.level == "error"]


def assert_equal(several: CovarianceStore, one: CovarianceStore) -> None:
    assert several.sites.keys() == one.sites.keys() and several.weights == one.weights
    for site in one.sites:
        assert several.sites[site].count == one.sites[site].count
        expected = one.covariance(site).double()
        assert (several.covariance(site).double() - expected).norm() < 1e-6 * expected.norm()


def _process(rank: int, count: int, port: int, target, arguments, answers) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                      LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with Workers.launched(torch.device("cpu")) as workers:
            answers.put((rank, target(workers, *arguments)))
    except PaveError as error:
        answers.put((rank, f"{type(error).__name__}: {error.message}"))


def crew(count: int, target, *arguments, silent: tuple[int, ...] = ()) -> list:
    """What `target(workers, *arguments)` returns, or the error it ends with, by rank.

    Processes whose ranks are in `silent` end without an answer; theirs is None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergekit_pave.calibration.run", target.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    processes = [
        context.Process(target=_process, args=(rank, count, port, target, arguments, answers))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=200) for _ in range(count - len(silent)))
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a process hangs"
    return [found.get(rank) for rank in range(count)]


def readers(covariances):
    return [lambda c=c: c for c in covariances]


def moment(width: int, rows: int = 200, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(0, -1, width)
    return x.T @ x / rows
