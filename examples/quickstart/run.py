"""Train three small experts, merge them with stock mergekit in three ways, compare.

    python examples/quickstart/run.py [--out DIR] [--fresh]

Everything is written below `out/`, next to this file; a second run reuses the experts it
finds there. README.md says what is trained on what.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from folders import all_or_nothing, write_rows

HERE = Path(__file__).parent
MERGES = ("recommended", "ties", "pave_ties")  # a YAML file beside this one each
SIZES = {"train": 3000, "validation": 500, "test": 1000}
CALIBRATION_ROWS = 256
HELD_OUT_ROWS = 64  # that `mergekit-pave evaluate` looks at, without their labels
SEED = 0

Table = dict[str, dict[str, float]]  # model -> task -> accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "out", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="forget the experts in OUT")
    args = parser.parse_args()
    # Before torch is imported: threads that spin while they wait are several times slower when
    # anything else wants the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    out = args.out.resolve()
    _require_packages()
    if args.fresh:
        for name in ("base", "experts", "heads", "calibration", "held-out", "merged", "cache"):
            shutil.rmtree(out / name, ignore_errors=True)

    seconds: dict[str, float] = {}
    with phase("prepare", seconds):
        data = prepare(out)
    with phase("train", seconds):
        for name, rows in data.items():
            train_expert(out, name, rows["train"])
    for name in MERGES:
        with phase(f"merge: {method(name)}", seconds):
            merge(out, name)
    with phase("accuracy", seconds):
        table = accuracies(out, {name: rows["test"] for name, rows in data.items()})
    with phase("evaluate, without labels", seconds):
        evaluate(out, list(data))

    text = markdown(table)
    (out / "results.md").write_text(text)
    draw(table, out / "results.png")
    (out / "results.json").write_text(
        json.dumps({"accuracy": table, "test_rows": SIZES["test"], "seconds": seconds}, indent=2)
    )
    print(f"\nAccuracy on {SIZES['test']} test rows of each task:\n\n{text}")
    print(f"{sum(seconds.values()):.0f} seconds. Table and picture: {out / 'results.md'}, .png")
    print(f"Merged models, for AutoModel.from_pretrained: {out / 'merged'}")


def method(name: str) -> str:
    """The merge method that a YAML file names."""
    text = (HERE / f"{name}.yml").read_text()
    return re.search(r"^merge_method: (\S+)$", text, re.MULTILINE)[1]


def prepare(out: Path) -> dict:
    """The base model, every task's rows, and the calibration files; returns the rows."""
    from tasks import BASE_PACKAGE, TASKS
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading 103 tensors
    base = files(BASE_PACKAGE) / "model"
    if not (out / "base").exists():
        with all_or_nothing(out / "base") as folder:
            AutoModel.from_pretrained(str(base)).save_pretrained(folder)
            AutoTokenizer.from_pretrained(str(base)).save_pretrained(folder)
    data = {}
    for task in TASKS:
        data[task.name] = task.load(SIZES)
        texts, _ = data[task.name]["train"]  # never the rows that are tested
        write_rows(out / "calibration" / f"{task.name}.jsonl", texts[:CALIBRATION_ROWS])
        texts, _ = data[task.name]["validation"]
        write_rows(out / "held-out" / f"{task.name}.jsonl", texts[:HELD_OUT_ROWS])
    return data


def train_expert(out: Path, name: str, rows) -> None:
    """A head for the frozen base, then base and head trained further: the expert.

    The expert's folder holds only what is merged, encoder and tokenizer; heads are not merged,
    each task keeps its own.
    """
    import torch
    from safetensors.torch import save_file
    from train import Classifier, fine_tune, fit_head

    if (out / "experts" / name).exists():
        print(f"  {name}: trained earlier (--fresh trains again)")
        return
    torch.manual_seed(SEED)
    model = Classifier(*_load(out / "base"))
    model.head = fit_head(model.all_features(rows[0]), rows[1])
    heads = {"base": copy.deepcopy(model.head)}
    for line in fine_tune(model, rows, SEED):
        print(f"  {name}: {line}", flush=True)
    heads["expert"] = model.head
    (out / "heads").mkdir(exist_ok=True)
    tensors = {f"{of}.{k}": v for of, head in heads.items() for k, v in head.state_dict().items()}
    save_file(tensors, out / "heads" / f"{name}.safetensors")
    with all_or_nothing(out / "experts" / name) as folder:  # last: its presence means "done"
        model.encoder.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)


def merge(out: Path, name: str) -> None:
    """Run the stock `mergekit-yaml` on a YAML file, its paths made absolute."""
    config = out / f"{name}.yml"
    config.write_text(resolve((HERE / config.name).read_text(), out))
    shutil.rmtree(out / "merged" / name, ignore_errors=True)
    command(out, "mergekit-yaml", config, out / "merged" / name)


def evaluate(out: Path, tasks: list[str]) -> None:
    """Ask `mergekit-pave evaluate` how much of each expert the merges keep."""
    rows = [f"--held-out={out / 'held-out' / task}.jsonl" for task in tasks]
    command(out, "mergekit-pave", "evaluate", *(out / "merged" / name for name in MERGES), *rows)


def command(out: Path, *words: object) -> None:
    """Show a command and run it; caches stay below `out`."""
    print("  $ " + " ".join(map(str, words)), flush=True)
    # Every input is local, so the Hub need not be asked.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MERGEKIT_PAVE_CACHE": str(out / "cache")}
    done = subprocess.run([_script(str(words[0])), *map(str, words[1:])], env=environment)
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with exit status {done.returncode}.")


def resolve(template: str, out: Path) -> str:
    """The templates say `./out`, so that they run from their own folder as they are."""
    return re.sub(r"(?<=: )\./out/(\S+)", lambda found: json.dumps(f"{out}/{found[1]}"), template)


def accuracies(out: Path, tests: dict) -> Table:
    """Test accuracy of base, experts and merges, every encoder under the task's own head."""
    from safetensors.torch import load_file
    from torch import nn
    from train import Classifier

    def accuracy(folder: Path, name: str, of: str = "expert") -> float:
        tensors = load_file(out / "heads" / f"{name}.safetensors")
        classes, width = tensors[f"{of}.weight"].shape
        head = nn.Linear(width, classes)
        head.load_state_dict({k: tensors[f"{of}.{k}"] for k in ("weight", "bias")})
        return Classifier(*_load(folder), head).accuracy(tests[name])

    models = {"base": out / "base", "experts": out / "experts"}
    models |= {method(name): out / "merged" / name for name in MERGES}
    # Base and experts stay as they are until they are trained again.
    kept = out / "heads" / "accuracy.json"
    table: Table = json.loads(kept.read_text()) if kept.exists() else {}
    for label, folder in models.items():
        if label in table:
            continue
        table[label] = {
            name: accuracy(
                folder / name if label == "experts" else folder,
                name,
                of="base" if label == "base" else "expert",
            )
            for name in tests
        }
        print(f"  {label}: " + ", ".join(f"{k} {v:.3f}" for k, v in table[label].items()))
        if label == "experts":
            kept.write_text(json.dumps(table))
    return table


def markdown(table: Table) -> str:
    tasks = list(next(iter(table.values())))
    lines = ["| model | " + " | ".join(tasks) + " | average |", "|---" * (len(tasks) + 2) + "|"]
    for label, row in table.items():
        values = [*row.values(), sum(row.values()) / len(row)]
        lines.append(f"| {label} | " + " | ".join(f"{100 * v:.1f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def draw(table: Table, file: Path) -> None:
    """Bars of the accuracies, a group for each task and one for their average."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    groups = [*next(iter(table.values())), "average"]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(table)
    for i, (label, row) in enumerate(table.items()):
        values = [100 * v for v in (*row.values(), sum(row.values()) / len(row))]
        where = [group + (i - (len(table) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(where, values, width, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylim=(max(0, 100 * min(min(r.values()) for r in table.values()) - 10), None),
             ylabel="accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(table), frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"[{name}]", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)
    print(f"  {seconds[name]:.0f} s", flush=True)


def _load(folder: Path):
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _script(name: str) -> str:
    """The command that was installed beside this Python, whatever PATH says."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit(f"{name} is not installed for {sys.executable}: pip install mergekit-pave")
    return found


def _require_packages() -> None:
    from tasks import BASE_PACKAGE, TASKS

    _script("mergekit-yaml")
    needed = [BASE_PACKAGE, "pythonbible", *(task.package for task in TASKS)]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise SystemExit(
            f"Missing {', '.join(missing)}: "
            f"{sys.executable} -m pip install --no-deps -r {HERE / 'requirements.txt'}"
        )


if __name__ == "__main__":
    main()
