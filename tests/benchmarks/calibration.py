"""What the statistics cost on top of the forward passes, and how exact their sums are.

    python tests/benchmarks/calibration.py [--layers N] [--repeats N] [--cpu-time] [--json PATH]

A RoBERTa-base-shaped encoder (768/3072) of a few layers on batches of 8 x 128 tokens. Timed in
turns, so that a busy machine slows all of them, and compared by the ratios of medians:

* forward: the bare forward passes over the batches.
* gram: one float32 product `x^T x` per distinct input tensor of a linear layer, from tensors that
  are ready: what a plain implementation has to pay at least.
* collect: `collect_window` over all sites, forward passes included.
* write: folding the sums, their checksums, and the file.

`collect / (forward + gram)` is to stay below 1.3. Accuracy is the relative error (Frobenius norm)
of the float32 sums against float64 sums of the same float32 inputs: the worst site of the model,
and a long run of correlated rows with an offset.

On a machine that others use as well, OMP_NUM_THREADS=1 and `--cpu-time` still give figures that
mean something: threads that wait for each other would burn the time of those that work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from mergekit_pave.algebra.second_moment import SecondMoment, fold, unfold
from mergekit_pave.calibration.collect import collect_window, forward, plan_sites, watching
from mergekit_pave.models.layers import linear_layers
from mergekit_pave.storage.covariances import StoreWriter

ROWS, LENGTH, BATCHES = 8, 128, 4


def encoder(layers: int) -> transformers.PreTrainedModel:
    config = transformers.RobertaConfig(vocab_size=5000, num_hidden_layers=layers, num_labels=2)
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config).eval()


def token_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 5000, (BATCHES, ROWS, LENGTH), generator=generator)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


class Pass:
    """Everything that is timed, on one model and the same batches."""

    def __init__(self, layers: int):
        self.model = encoder(layers)
        self.batches = token_batches()
        self.modules = linear_layers(self.model).modules
        self.sites = plan_sites(self.model, self.modules, self.batches[0])
        self.inputs = self._inputs()

    def _inputs(self) -> list[tuple[str, Tensor]]:
        """One batch's distinct input tensors, `(rows, width)`, by site."""
        found: list[tuple[str, Tensor]] = []
        watched = {site.name: self.modules[site.name] for site in self.sites}
        keep = lambda name, x: found.append((name, x.flatten(0, -2).clone()))  # noqa: E731
        with watching(watched, keep):
            forward(self.model, self.batches[0])
        return found

    def forward(self) -> None:
        for batch in self.batches:
            forward(self.model, batch)

    def gram(self) -> None:
        for _ in self.batches:
            for _, x in self.inputs:
                x.T @ x

    def collect(self) -> dict[str, SecondMoment]:
        silent = tqdm(disable=True)
        return collect_window(self.model, self.modules, self.sites, self.batches, silent)

    def write(self, moments: dict[str, SecondMoment]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            StoreWriter(Path(folder), "benchmark").take(dict(moments))


def timed(work: dict[str, Callable], repeats: int, clock: Callable) -> dict[str, float]:
    """Median seconds of each, in turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, function in work.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def model_error(run: Pass) -> float:
    """Worst relative error over the sites, of one batch."""
    return max(_error([x]) for _, x in run.inputs)


def long_error(width: int = 768, rows: int = 1024, batches: int = 256) -> float:
    """Relative error of the sum of 262,144 correlated rows with an offset, batch by batch."""
    g = torch.Generator().manual_seed(2)
    mixing = torch.randn(width, width, generator=g) * torch.arange(1, width + 1) ** -0.5
    offset = 5 * torch.randn(width, generator=g)
    return _error(
        torch.randn(rows, width, generator=g) @ mixing.T + offset for _ in range(batches))


def _error(chunks) -> float:
    ours, exact = SecondMoment(0), 0
    for x in chunks:
        ours.width = x.shape[1]
        ours.add(x)
        exact = exact + x.double().T @ x.double()
    exact = exact / ours.count
    mean = unfold(fold(ours.total) / ours.count).double()
    return float((mean - exact).norm() / exact.norm())


def measure(layers: int, repeats: int, clock: Callable) -> dict[str, float]:
    run = Pass(layers)
    with torch.inference_mode():
        moments = run.collect()
        work = {"forward": run.forward, "gram": run.gram, "collect": run.collect,
                "write": partial(run.write, moments)}
        seconds = timed(work, repeats, clock)
    basis = seconds["forward"] + seconds["gram"]
    return {
        "sites": len(run.sites), "tokens": BATCHES * ROWS * LENGTH,
        **{f"{name} (s)": value for name, value in seconds.items()},
        **{f"{name} / (forward + gram)": seconds[name] / basis for name in ("collect", "write")},
        "gram / forward": seconds["gram"] / seconds["forward"],
        "float32 error, worst site": model_error(run),
        "float32 error, 262,144 rows": long_error(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="time of this process's threads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    figures = measure(options.layers, options.repeats, clock)
    for name, value in figures.items():
        print(f"{name:32} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
