"""Publishing on the Hugging Face Hub: merged models, and covariance stores as data sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import own_code, sentence_files, written
from mergekit_pave.models.headers import check_finished
from mergekit_pave.publish import record
from mergekit_pave.publish.card import FIGURES, write_card
from mergekit_pave.publish.markdown import CARD
from mergekit_pave.publish.store_card import store_card
from mergekit_pave.recipe.reading import CONFIGURATION
from mergekit_pave.storage import masks
from mergekit_pave.storage.archive import inside
from mergekit_pave.storage.covariances import CovarianceStore
from mergekit_pave.storage.files import write_text


def push_merge(
    folder: Path | str, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Complete the card of the merge in `folder`, upload it, return the repository's URL.

    Only `merge_files` are uploaded; they are listed on standard error before it begins.

    Raises:
        PaveError: no finished merge, a bad repository id, nobody logged in, a failed upload.
    """
    folder = Path(folder)
    token = check_target(repo_id, token)
    merge_files(folder)  # refuses links before the card reads anything through one
    write_card(folder)
    again = f"mergekit-pave card {folder} --push {repo_id}"
    return _upload(folder, merge_files(folder), repo_id, "model", private, token, again)


def merge_files(folder: Path) -> list[str]:
    """What of a merge's folder is published: weights that are whole, config, tokenizer, card,
    configuration, record and task masks.

    Raises:
        PaveError: the merge is not finished, or a file of it is a link that leads elsewhere.
    """
    names = [*check_finished(folder), *written(folder), *own_code(folder),
             *sentence_files(folder)]
    card = (folder / CARD).read_text("utf-8", "replace") if (folder / CARD).is_file() else ""
    own = (CARD, CONFIGURATION, record.NAME, *(name for name in FIGURES if f"({name})" in card))
    names += [name for name in own if (folder / name).is_file()]
    facts = record.read(folder)
    emr = facts is not None and facts.merge_method in ("emr", "pave_emr")
    if emr or masks.files(folder):
        names += [f"{masks.FOLDER}/{name}" for name in masks.TaskMasks(folder).files]
    return _within(folder, names)


def _within(folder: Path, names: Iterable[str]) -> list[str]:
    """The names, none twice; raises `PaveError` for a link that leads out of the folder."""
    try:
        return [name for name in dict.fromkeys(names) if inside(folder, name)]
    except ValueError as error:
        raise PaveError(
            f"Nothing is uploaded: in {folder} {error}; put a copy there, in place of the link."
        ) from error


def push_store(
    folder: Path | str, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload the covariance store in `folder` as a data set; return the repository's URL.

    Only its manifest, the files that this names, and README.md are uploaded; they are listed on
    standard error before it begins. A README.md that was edited, to say a licence perhaps, is
    published as it is.

    Raises:
        PaveError: no complete store, a bad repository id, nobody logged in, a failed upload.
    """
    token = check_target(repo_id, token)
    store = CovarianceStore(folder)
    card = store.folder / CARD
    text = store_card(store, repo_id)
    _within(store.folder, [CARD, *store.files])
    try:
        if not card.is_file() or _is_unedited(card.read_text("utf-8"), store):
            write_text(card, text)
    except UnicodeDecodeError as error:
        raise PaveError(f"{card} is not text in UTF-8: save it as such, or remove it.") from error
    names = _within(store.folder, [CARD, *store.files])
    again = f"mergekit-pave publish {store.folder} {repo_id}"
    return _upload(store.folder, names, repo_id, "dataset", private, token, again)


def _is_unedited(text: str, store: CovarianceStore) -> bool:
    """Whether a card is as an earlier upload wrote it, to another repository perhaps."""
    named = re.search(r"^ +covariance: (.+)$", text, re.MULTILINE)
    return named is not None and text == store_card(store, named[1])


def check_target(repo_id: str, token: str | None = None) -> str:
    """The token to publish with. Called before hours of work, which a wrong name would waste.

    Raises:
        PaveError: `repo_id` is not the id of a repository, or nobody is logged in.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PaveError(
            f"{repo_id!r} is no repository id of the Hub ({error}); write USER/NAME."
        ) from error
    token = token or get_token()
    if not token:
        raise PaveError(
            "Publishing needs you to be logged in to the Hub: run `hf auth login`, or set HF_TOKEN."
        )
    return token


def _announce(folder: Path, names: Sequence[str], repo_id: str) -> None:
    sizes = [(folder / name).stat().st_size for name in names]
    lines = [f"Uploading {len(names)} files ({sum(sizes):,} bytes) from {folder} to {repo_id}:"]
    lines += [f"  {name} ({size:,} bytes)" for name, size in zip(names, sizes, strict=True)]
    left = {entry.name for entry in folder.iterdir()} - {name.split("/")[0] for name in names}
    if left:
        lines.append(f"Not uploaded: {', '.join(sorted(left))}")
    click.echo("\n".join(lines), err=True)


def _upload(
    folder: Path, names: Sequence[str], repo_id: str, repo_type: str, private: bool, token: str,
    again: str,
) -> str:
    _announce(folder, names, repo_id)
    api = HfApi(token=token)
    try:
        # `None` leaves the choice to the owner's settings.
        url = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True)
        # All files go into one commit, so that a failure midway changes nothing that others see.
        api.create_commit(
            url.repo_id, [CommitOperationAdd(name, str(folder / name)) for name in names],
            repo_type=repo_type, commit_message="Upload with mergekit-pave",
        )
    except OfflineModeIsEnabled as error:
        raise PaveError("--push needs the network, and HF_HUB_OFFLINE is set.") from error
    except Exception as error:  # the client's transport errors share no base with anything
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PaveError(
                f"Your token may not write to {repo_id}: use one with write access to it "
                "(`hf auth login`)."
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PaveError(
            f"The upload to {repo_id} failed ({lines[0].rstrip('.')}), and the repository is as it "
            f"was; try again with `{again}`."
        ) from error
    return str(url)
