"""One small folder of every format that we write, and a full reading of each."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers import ABOUT, add_window
from mergekit_pave.algebra.emr import Trace
from mergekit_pave.storage.archive import Reference
from mergekit_pave.storage.covariances import CovarianceStore, StoreWriter, Weight
from mergekit_pave.storage.identity import checksum, fingerprint
from mergekit_pave.storage.low_rank import MODEL, Compressed, Kept, Writer, pack
from mergekit_pave.storage.masks import FOLDER, Recorder, TaskMasks

WEIGHT = torch.arange(24.0).reshape(6, 4)
BASE = torch.zeros(6, 4)


def make_store(folder: Path) -> Path:
    writer = StoreWriter(folder, "run")
    add_window(writer, {"a": (torch.eye(4), 7)})
    add_window(writer, {"b": (torch.eye(3) * 2, 7)})
    weights = {"x.weight": (Weight("a", (6, 4), False, "float32"), fingerprint(WEIGHT))}
    writer.finish(weights, {"y.weight": "why"}, ABOUT)
    return folder


def read_store(folder: Path) -> None:
    store = CovarianceStore(folder)
    assert all(store.covariance(site).isfinite().all() for site in store.sites)
    store.find("x.weight", WEIGHT)


def make_masks(folder: Path) -> Path:
    recorder = Recorder(folder / FOLDER, {"m": "org/m", "n": "org/n"}, "base",
                        Reference("base", None), "float32", rearranges=True)
    traces = [("m", Trace(BASE > 0, 1.0, 2.0)), ("n", Trace(WEIGHT > 3, 1.0, 2.0))]
    recorder.add("x.weight", "base", WEIGHT, traces, "global", vocabulary=True)
    recorder.add("y.weight", "base", WEIGHT, traces[1:], "global", vocabulary=False)
    recorder.keep("m", {"config.json": b"{}", "tokenizer.json": None})
    recorder.finish()
    return folder


def read_masks(folder: Path) -> None:
    masks = TaskMasks(folder)
    for task in range(len(masks.tasks)):
        masks.companions(task)
    for name, tensor in masks.tensors.items():
        for task in tensor.tasks:
            assert masks.mask(name, task).shape == tensor.shape
        if tensor.keeps_base:
            assert masks.kept_base(name).shape == tensor.shape


def make_compressed(folder: Path) -> Path:
    (folder / MODEL).mkdir(parents=True)
    (folder / MODEL / "config.json").write_text("{}")
    writer = Writer(folder)
    rows = BASE.clone()
    rows[2] = 1
    low = torch.outer(torch.ones(6), torch.arange(4.0))
    for name, tensor in {"f": low, "r": rows, "w": torch.ones(3), "b": BASE}.items():
        base = None if name == "w" else BASE
        how, stored, energy = pack(tensor, base, 1, torch.float32)
        writer.add(name, stored, Kept(
            how, tuple(tensor.shape), "float32", None if base is None else checksum(base),
            1 if how == "factors" else None, energy))
    assert {kept.how for kept in writer.tensors.values()} == {"factors", "rows", "whole", "base"}
    writer.finish({"base": {"id": "base", "hub": None}})
    return folder


def read_compressed(folder: Path) -> None:
    task = Compressed(folder)
    for name, kept in task.tensors.items():
        assert task.tensor(name, kept.base and BASE).shape == kept.shape


FORMATS = {"store": (make_store, read_store), "masks": (make_masks, read_masks),
           "compressed": (make_compressed, read_compressed)}
