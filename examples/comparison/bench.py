"""One setting at work: experts, merges through the stock command, and scores kept on disk.

A score is found again by what it depends on: the YAML, the experts, the split. So a run that was
stopped goes on where it stopped, and a new method costs only its own merges.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml
from methods import Method, Place, text

Rows = list[np.ndarray]  # per task


class NotScored(Exception):
    """A score that an earlier run has not come to."""


class Bench:
    """A setting (`encoder` or `causal`), its folder, whether it runs small, and whether at all."""

    def __init__(self, setting: ModuleType, out: Path, quick: bool, finished_only: bool = False):
        self.setting, self.out, self.quick = setting, out, quick
        self.finished_only = finished_only
        self.tasks: tuple[str, ...] = setting.NAMES[:-1] if quick else setting.NAMES
        self.merges = 0

    def prepare(self, seeds: tuple[int, ...]) -> None:
        """Base model, calibration data and all experts, unless they are there."""
        if self.finished_only:
            experts = [self.place(seed).expert(task) for seed in seeds for task in self.tasks]
            if missing := [str(folder) for folder in experts if not folder.exists()]:
                raise SystemExit(f"Nothing is finished without {missing[0]}: leave --finished out.")
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.setting.prepare(self.out, self.quick)
        for seed in seeds:
            for task in self.tasks:
                self.setting.train(self.out, task, seed, self.quick)

    def place(self, seed: int) -> Place:
        samples = self.setting.CALIBRATION_SAMPLES[self.quick]
        return Place(self.out, seed, self.tasks, samples, self.setting.MAX_LENGTH)

    def groups(self, split: str) -> list[list]:
        return [self.setting.groups(task, split, self.quick) for task in self.tasks]

    # --- scores ----------------------------------------------------------------------------

    def references(self, seed: int, split: str) -> dict[str, Rows]:
        """The base's scores, and every expert's on its own task."""
        experts = {task: self.place(seed).expert(task) for task in self.tasks}
        return {
            "base": self._kept("base", seed, split, dict.fromkeys(self.tasks, self._base)),
            "experts": self._kept("experts", seed, split, experts),
        }

    def scores(
        self, method: Method, name: str, configuration: dict, seed: int, splits: tuple[str, ...]
    ) -> dict[str, Rows]:
        """Row scores of a merge on every split; merges only if one is not on disk.

        Raises:
            NotScored: one is not, and nothing is to be merged.
        """
        source = text(method, configuration)
        found = {split: self.known(source, seed, split) for split in splits}
        if any(rows is None for rows in found.values()):
            if self.finished_only:
                raise NotScored
            with self.merged(method, name, source, seed) as models:
                for split in splits:
                    found[split] = self._kept(source, seed, split, models, name)
        return found

    @property
    def _base(self) -> Path:
        return self.out / "base"

    def _kept(
        self, source: str, seed: int, split: str, models: dict[str, Path], name: str | None = None
    ) -> Rows:
        if (found := self.known(source, seed, split)) is not None:
            return found
        start = time.perf_counter()
        rows = {
            task: self.setting.score(self.out, models[task], task, seed, split, self.quick)
            for task in self.tasks
        }
        self._write(source, seed, split, rows, name or source, time.perf_counter() - start)
        return [np.asarray(rows[task], dtype=float) for task in self.tasks]

    def _file(self, source: str, seed: int, split: str) -> Path:
        # Not the folder: results may be moved.
        portable = source.replace(str(self.out), "OUT")
        parts = [portable, self._identity(seed), str(seed), split, str(self.quick)]
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return self.out / "scores" / f"{digest[:24]}.json"

    def known(self, source: str, seed: int, split: str) -> Rows | None:
        """What is on disk for a YAML, `base` or `experts`."""
        file = self._file(source, seed, split)
        if not file.exists():
            return None
        rows = json.loads(file.read_text())["rows"]
        return [np.asarray(rows[task], dtype=float) for task in self.tasks]

    def _write(
        self, source: str, seed: int, split: str, rows: dict, name: str, seconds: float
    ) -> None:
        file = self._file(source, seed, split)
        file.parent.mkdir(exist_ok=True)
        found = {
            "name": name, "setting": self.setting.KIND, "seed": seed, "split": split,
            "quick": self.quick, "metric": self.setting.METRIC, "yaml": source,
            "seconds": round(seconds, 2), "rows": rows,
        }
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(found))
        part.rename(file)

    def forget(self, names: set[str]) -> int:
        """Drop the scores of these methods, whose code has changed."""
        dropped = 0
        for file in (self.out / "scores").glob("*.json"):
            if json.loads(file.read_text())["name"].split(",")[0] in names:
                file.unlink()
                dropped += 1
        return dropped

    @functools.cache  # noqa: B019 - a bench lives as long as the run
    def _identity(self, seed: int) -> str:
        """Of base and experts: retrained ones have other scores."""
        digest = hashlib.sha256()
        for folder in (self._base, *map(self.place(seed).expert, self.tasks)):
            for file in sorted(folder.glob("*.safetensors")):
                with open(file, "rb") as opened:
                    while block := opened.read(2**22):
                        digest.update(block)
        return digest.hexdigest()

    def suggested(self, source: str, seed: int) -> dict[str, Any]:
        """The parameters that `mergekit-pave suggest` prints for a merge, asked once."""
        file = self.out / "suggested" / f"{self._file(source, seed, '').stem}.yml"
        if not file.exists():
            if self.finished_only:
                raise NotScored
            file.parent.mkdir(exist_ok=True)
            config = file.with_suffix(".merge")
            config.write_text(source)
            file.write_text(pave("suggest", config))
            config.unlink()
        return yaml.safe_load(file.read_text())["parameters"]

    # --- merges ----------------------------------------------------------------------------

    @contextmanager
    def merged(
        self, method: Method, name: str, source: str, seed: int
    ) -> Iterator[dict[str, Path]]:
        """The model of every task, often the same; gone afterwards. The YAML stays."""
        # A folder of its own for every merge: settings remember the model they opened last.
        folder = self.out / "merged" / f"{self._file(source, seed, '').stem}-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = folder / "merge.yml"
        config.write_text(source)
        try:
            start = time.perf_counter()
            models = self._models(method, config, folder, seed)
            seconds = time.perf_counter() - start
            self.merges += 1
            print(f"  {name}, seed {seed}: merged in {seconds:.1f} s", flush=True)
            yield models
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _models(self, method: Method, config: Path, folder: Path, seed: int) -> dict[str, Path]:
        """Run the method's commands; task -> model."""
        if method.task_models == "tsv_c":
            pave("compress", config, folder / "compressed")
            for task in self.tasks:
                parts = (folder / "compressed" / task, folder / task)
                pave("reconstruct", *parts, "--base", self._base)
            return {task: folder / task for task in self.tasks}
        merge(config, folder / "model", seed)
        if method.task_models == "emr":
            for task in self.tasks:
                pave("materialize", folder / "model", task, folder / task, "--base", self._base)
            return {task: folder / task for task in self.tasks}
        return dict.fromkeys(self.tasks, folder / "model")

    def keep_yaml(self, name: str, seed: int, source: str) -> None:
        """The YAML of a reported number, under a name that can be found."""
        file = self.out / "yaml" / f"{slug(name)}-{seed}.yml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in name).strip("-")


def merge(config: Path, folder: Path, seed: int) -> None:
    """What `mergekit-yaml CONFIG FOLDER` does, in this process: it starts once, not each time."""
    from mergekit.scripts.run_yaml import main

    options = ["--quiet", "--random-seed", str(seed)]
    main([str(config), str(folder), *options], standalone_mode=False)


def pave(*arguments: str | Path | int) -> str:
    """What `mergekit-pave ARGUMENTS` does, in this process; what it prints."""
    from mergekit_pave.cli import main

    with redirect_stdout(StringIO()) as printed:
        main(list(map(str, arguments)), standalone_mode=False)
    return printed.getvalue()
