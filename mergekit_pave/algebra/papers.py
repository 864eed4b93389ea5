"""The papers behind our methods, and what a model card says of each method that has one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One to cite; `authors` as BibTeX has them."""

    key: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def link(self) -> str:
        return f"[arXiv {self.arxiv}]({self.url})"

    @property
    def bibtex(self) -> str:
        return f"""\
@misc{{{self.key},
  title = {{{self.title}}},
  author = {{{self.authors}}},
  year = {{{self.year}}},
  eprint = {{{self.arxiv}}},
  archivePrefix = {{arXiv}},
  url = {{{self.url}}}
}}"""


PAVE = Paper(
    "pave", "Purifying Task Vectors in Knowledge-Aware Subspace for Model Merging",
    "Bang An and Yibo Yang and Philip Torr and Bernard Ghanem", 2025, "2510.14697")

TSV = Paper(
    "tsv", "Task Singular Vectors: Reducing Task Interference in Model Merging",
    "Antonio Andrea Gargiulo and Donato Crisostomi and Maria Sofia Bucarelli and "
    "Simone Scardapane and Fabrizio Silvestri and Emanuele Rodol{\\`a}", 2024, "2412.00081")

REGMEAN = Paper(
    "regmean", "Dataless Knowledge Fusion by Merging Weights of Language Models",
    "Xisen Jin and Xiang Ren and Daniel Preotiuc-Pietro and Pengxiang Cheng", 2022, "2212.09849")

EMR = Paper(
    "emr", "EMR-Merging: Tuning-Free High-Performance Model Merging",
    "Chenyu Huang and Peng Ye and Tao Chen and Tong He and Xiangyu Yue and Wanli Ouyang", 2024,
    "2405.17461")
