"""The encoder half of the comparison: MiniLM, six classification tasks, full fine-tunes.

Heads are not merged: every task keeps its own, and scores an encoder under it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from folders import all_or_nothing, write_rows
from safetensors.torch import load_file, save_file
from tasks import BASE_PACKAGE, Rows, Task
from tasks_encoder import TASKS
from torch import nn
from train import Classifier, fine_tune, fit_head
from transformers import AutoModel, AutoTokenizer

KIND = "encoder"
WRITES = False  # can its models write calibration data?
METRIC = "accuracy"
NAMES = tuple(task.name for task in TASKS)
HALVES = ("even", "odd")  # `icd-odd` is every second chapter, a task of its own
SIZES = {"train": 4000, "validation": 150, "test": 400}
QUICK = {"train": 600, "validation": 100, "test": 200}
EPOCHS, LEARNING_RATE = 2, 2e-4
CALIBRATION_ROWS = 1024
CALIBRATION_SAMPLES = {False: 256, True: 32}  # of those, in a merge
SAMPLE_SIZES = (16, 64, 256, 1024)
MAX_LENGTH = 64


def strength(model: np.ndarray, base: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """Accuracy as a fraction of the expert's."""
    return model / expert


@functools.cache
def rows(task: str, quick: bool) -> dict:
    """Split -> (texts, labels). Test rows are never trained, calibrated or tuned on."""
    name, _, half = task.partition("-")
    found = _task(name).load(QUICK if quick else SIZES)
    return half_of(found, HALVES.index(half)) if half else found


def half_of(found: dict[str, Rows], half: int) -> dict[str, Rows]:
    """The rows of every second class, from class `half` on, and those classes numbered anew."""
    kept = {name: [(text, label // 2) for text, label in zip(*split, strict=True)
                   if label % 2 == half] for name, split in found.items()}
    return {name: tuple(map(list, zip(*split, strict=True))) for name, split in kept.items()}


def _task(name: str) -> Task:
    (found,) = (t for t in TASKS if t.name == name.partition("-")[0])
    return found


@functools.cache
def held_out(task: str, split: str, quick: bool) -> tuple[list[str], list[int]]:
    """The rows of `validation` or `test` that no other task has shown to any model before.

    Two tasks may ask different things about one text, and each task splits for itself.
    """
    earlier = ("train",) if split == "validation" else ("train", "validation")
    seen = {text for other in NAMES for name in earlier for text in rows(other, quick)[name][0]}
    found = zip(*rows(task, quick)[split], strict=True)
    texts, labels = zip(*(row for row in found if row[0] not in seen), strict=True)
    return list(texts), list(labels)


@functools.cache
def groups(task: str, split: str, quick: bool) -> list[str]:
    """What each row is a near copy within: its category, chapter, or nothing but itself."""
    group_of = {" ".join(text.split()): group for group, text, _ in _task(task).rows() if text}
    return [group_of[text] for text in held_out(task, split, quick)[0]]


def prepare(out: Path, quick: bool, names: Iterable[str] = NAMES) -> None:
    """The base model and every task's calibration rows below `out`."""
    folder = files(BASE_PACKAGE) / "model"
    if not (out / "base").exists():
        with all_or_nothing(out / "base") as base:
            AutoModel.from_pretrained(str(folder)).save_pretrained(base)
            AutoTokenizer.from_pretrained(str(folder)).save_pretrained(base)
    for task in names:
        texts, _ = rows(task, quick)["train"]
        write_rows(out / "calibration" / f"{task}.jsonl", texts[:CALIBRATION_ROWS])


def train(out: Path, task: str, seed: int, quick: bool) -> None:
    """One expert: `experts/SEED/TASK`, its head beside it."""
    folder = out / "experts" / str(seed) / task
    if folder.exists():
        return
    data = rows(task, quick)["train"]
    torch.manual_seed(seed)
    model = Classifier(*_load(out / "base"))
    heads = {"base": fit_head(model.all_features(data[0]), data[1])}
    # Not that one: an encoder that has to fit a fresh head moves further, as fine-tunes do.
    model.head = nn.Linear(*reversed(heads["base"].weight.shape))
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
    texts, labels = held_out(task, split, quick)
    classifier = Classifier(*_load(model), head)
    # bfloat16 products: 1.6 times as fast on CPUs that have them, and the same for all models.
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        guesses = head(classifier.all_features(texts)).argmax(dim=1)
    return (guesses == torch.tensor(labels)).float().tolist()


def _load(folder: Path):
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
