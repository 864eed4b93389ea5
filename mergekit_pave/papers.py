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


@dataclass(frozen=True)
class About:
    """What a method of ours does, in Markdown, and where it comes from."""

    text: str
    papers: tuple[Paper, ...]


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

_REST = "everything else (norms, biases, vocabulary) got the mean of the differences."
# By the name of the method, or of the one that a purified twin wraps.
ABOUT = {
    "tsv_m": About(
        "In every matrix, the leading singular directions of the models' differences from the "
        f"base were made orthogonal to each other and added (TSV-Merge, {TSV.link}); {_REST}",
        (TSV,)),
    "regmean": About(
        "Every linear weight was solved for in closed form, by the covariances of the models' "
        f"layer inputs (RegMean, {REGMEAN.link}); {_REST}",
        (REGMEAN,)),
    "tsv_regmean": About(
        "Every linear weight is a mixture of two merges. One makes the leading singular directions "
        f"of the models' differences from the base orthogonal to each other (TSV-Merge, {TSV.link})"
        ", the other is solved for by the covariances of the models' layer inputs (RegMean, "
        f"{REGMEAN.link}); {_REST}",
        (TSV, REGMEAN)),
    "emr": About(
        "These are the weights that all tasks share; alone they are not meant to be used. The "
        "folder `emr` holds one bit per parameter and task, which turn them into each task's model "
        f"(EMR-Merging, {EMR.link}): `mergekit-pave materialize MODEL TASK DIR` writes it as a "
        "model folder, and `mergekit_pave.emr_models.load_task_model(MODEL, TASK)` loads it. MODEL "
        "is this one's folder or Hub id, TASK one of the merged models: its name or its number "
        "from 0.",
        (EMR,)),
}
