"""Fixtures of all tests: one family of tiny models a kind, texts, and a cache for each test."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Matrices of 32 columns: a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
pytest.register_assert_rewrite("helpers")

from helpers import emr_config, make_family, merge, recipe, write_texts  # noqa: E402


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


@pytest.fixture
def good(families, texts) -> dict:
    return recipe(families("llama"), texts)


@pytest.fixture(scope="module")
def emr_trio(tmp_path_factory):
    """`emr_trio(kind)` -> a base and three fine-tunes, in float32."""
    made = {}

    def get(kind: str, **more):
        key = (kind, *more.values())
        if key not in made:
            made[key] = make_family(tmp_path_factory.mktemp(kind), kind, experts=3, **more)
        return made[key]

    return get


@pytest.fixture(scope="module")
def emr_merged(emr_trio, tmp_path_factory) -> Path:
    """A finished merge of three tiny Llamas, with mergekit's card and configuration."""
    out = tmp_path_factory.mktemp("emr") / "out"
    merge(emr_config(emr_trio("llama")), out, write_model_card=True, copy_tokenizer=True,
          out_shard_size=20_000)
    return out


@pytest.fixture
def emr_copy(emr_merged, tmp_path) -> Path:
    """A copy of that merge, to be damaged."""
    return shutil.copytree(emr_merged, tmp_path / "copy")
