"""The encoder half of the comparison: MiniLM, six classification tasks, full fine-tunes.

Heads are not merged: every task keeps its own, and scores an encoder under it.
"""

from __future__ import annotations

import copy
import functools
import json
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tasks import BASE_PACKAGE
from tasks_encoder import TASKS
from torch import nn
from train import Classifier, fine_tune, fit_head
from transformers import AutoModel, AutoTokenizer

from folders import all_or_nothing

KIND = "encoder"
NAMES = tuple(task.name for task in TASKS)
SIZES = {"train": 4000, "validation": 400, "test": 1000}
QUICK = {"train": 600, "validation": 100, "test": 200}
EPOCHS, LEARNING_RATE = 2, 1e-4
CALIBRATION_ROWS = 1024
MAX_LENGTH = 64


@functools.cache
def rows(task: str, quick: bool) -> dict:
    """Split -> (texts, labels). Test rows are never trained, calibrated or tuned on."""
    (found,) = (t for t in TASKS if t.name == task)
    return found.load(QUICK if quick else SIZES)


def prepare(out: Path, quick: bool) -> None:
    """The base model and every task's calibration rows below `out`."""
    folder = files(BASE_PACKAGE) / "model"
    if not (out / "base").exists():
        with all_or_nothing(out / "base") as base:
            AutoModel.from_pretrained(str(folder)).save_pretrained(base)
            AutoTokenizer.from_pretrained(str(folder)).save_pretrained(base)
    (out / "calibration").mkdir(exist_ok=True)
    for task in NAMES:
        texts, _ = rows(task, quick)["train"]
        lines = [json.dumps({"text": text}) + "\n" for text in texts[:CALIBRATION_ROWS]]
        (out / "calibration" / f"{task}.jsonl").write_text("".join(lines))


def train(out: Path, task: str, seed: int, quick: bool) -> None:
    """One expert: `experts/SEED/TASK`, its head beside it."""
    folder = out / "experts" / str(seed) / task
    if folder.exists():
        return
    data = rows(task, quick)["train"]
    torch.manual_seed(seed)
    model = Classifier(*_load(out / "base"))
    model.head = fit_head(model.all_features(data[0]), data[1])
    heads = {"base": copy.deepcopy(model.head)}
    for line in fine_tune(model, data, seed, EPOCHS, LEARNING_RATE):
        print(f"  {task}, seed {seed}: {line}", flush=True)
    heads["expert"] = model.head
    tensors = {f"{of}.{k}": v for of, head in heads.items() for k, v in head.state_dict().items()}
    with all_or_nothing(folder) as expert:
        model.encoder.save_pretrained(expert)
        model.tokenizer.save_pretrained(expert)
        save_file(tensors, expert / "head.safetensors")


def score(out: Path, model: Path, task: str, seed: int, split: str, quick: bool) -> list[float]:
    """1.0 or 0.0 for every row of the split: right or wrong under the task's own head."""
    of = "base" if model == out / "base" else "expert"
    tensors = load_file(out / "experts" / str(seed) / task / "head.safetensors")
    head = nn.Linear(*reversed(tensors[f"{of}.weight"].shape))
    head.load_state_dict({name: tensors[f"{of}.{name}"] for name in ("weight", "bias")})
    texts, labels = rows(task, quick)[split]
    classifier = Classifier(*_load(model), head)
    with torch.no_grad():
        guesses = head(classifier.all_features(texts)).argmax(dim=1)
    return (guesses == torch.tensor(labels)).float().tolist()


def _load(folder: Path):
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
