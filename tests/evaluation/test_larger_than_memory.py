"""Models larger than memory are scored from their shards, as exactly and with few reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shards import reads

from mergekit_pave.calibration.blocks import Walk
from mergekit_pave.calibration.load import Resources
from mergekit_pave.evaluation.held_out import held_out
from mergekit_pave.evaluation.models import opened
from mergekit_pave.evaluation.scores import kind_of, reference, score
from mergekit_pave.models.source import ModelSource
from mergekit_pave.recipe.parameters import CalibrationSpec

# Scores a model as its own expert; says what was read from the shards.
CHILD = """
import sys
from accelerate.utils.offload import OffloadedWeightsLoader
from mergekit_pave.calibration.load import Resources
from mergekit_pave.evaluation.held_out import held_out
from mergekit_pave.evaluation.models import opened
from mergekit_pave.evaluation.scores import reference
from mergekit_pave.models.source import ModelSource
from mergekit_pave.recipe.parameters import CalibrationSpec
import torch

read, real = 0, OffloadedWeightsLoader.__getitem__

def counted(self, key):
    global read
    tensor = real(self, key)
    read += tensor.numel()
    return tensor

OffloadedWeightsLoader.__getitem__ = counted
path, data, memory, out = sys.argv[1:]
source = ModelSource(path, "model", path)
rows = held_out(source, CalibrationSpec(data), 6, 80, drawn=False)
with opened(source, Resources(max_memory=int(memory))) as model:
    torch.save(reference(model, "language", rows.items)[0], out)
print(f"read={read}", file=sys.stderr)
"""
SHARDS = Resources(max_memory=20_000)  # most weights stay on disk


def _scores(paths, texts, resources):
    """Row scores of the base as `expert0`, and the kind of both."""
    expert, base = (ModelSource(str(paths[n]), n, str(paths[n])) for n in ("expert0", "base"))
    rows = held_out(expert, CalibrationSpec(str(texts[0])), 12, 64, drawn=False)
    kind = kind_of(expert.config())
    with opened(expert, Resources()) as model:
        said = reference(model, kind, rows.items)[0]
    with opened(base, resources) as model:
        return score(model, kind, rows.items, said), kind


@pytest.mark.parametrize("agrees", [True, False], ids=["blocks", "passes"])
@pytest.mark.parametrize("kind", ["llama", "roberta", "bert", "t5"])
def test_scores_are_those_of_the_model_in_memory(families, texts, kind, agrees, monkeypatch):
    whole, _ = _scores(families(kind), texts, Resources())
    if not agrees:
        monkeypatch.setattr(Walk, "agrees", lambda walk, marks: False)
    found, _ = _scores(families(kind), texts, SHARDS)
    assert found.keys() == whole.keys()
    for name in whole:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_every_weight_is_read_twice(families, texts, kind, monkeypatch):
    read = reads(monkeypatch)
    _scores(families(kind), texts, SHARDS)
    # In the pass that finds the blocks, and in the walk.
    assert read and max(read.values()) == 2, read


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_peak_stays_far_below_the_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from generated import Shape, cost_of, write_model

    shape, cost, read = Shape(layers=14), {}, {}
    model, data = write_model(tmp_path / "model", shape), tmp_path / "data.jsonl"
    # Rows of different lengths, which no batch holds together.
    data.write_text("".join(
        f'{{"text": "{" ".join(f"w{7 * i + j}" for j in range(20 + 10 * i))}"}}\n'
        for i in range(6)))
    for way, memory in (("whole", 10**11), ("shards", 5 * 10**8)):
        cost[way], err = cost_of([sys.executable, "-c", CHILD, model, data, memory,
                                  tmp_path / way], {"OMP_NUM_THREADS": "1"})
        read[way] = int(err.rpartition("read=")[2])
    peaks = {way: f"{c.peak / 1e9:.2f} GB, {c.wall:.0f} s" for way, c in cost.items()}
    sys.stderr.write(f"\n{4 * shape.parameters / 1e9:.2f} GB of weights: {peaks}, "
                     f"{read['shards'] / shape.parameters:.2f} times read\n")
    found, whole = (torch.load(tmp_path / way) for way in ("shards", "whole"))
    for row, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(row["logp"], expected["logp"], rtol=1e-6, atol=1e-6)
    assert cost["whole"].peak - cost["shards"].peak > 0.6 * 4 * shape.parameters
    assert not read["whole"] and read["shards"] < 2.05 * shape.parameters
