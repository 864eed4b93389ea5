"""Publishing on the Hugging Face Hub: merged models, and covariance stores as data sets."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from mergekit_pave.errors import PaveError
from mergekit_pave.models.folder import check_finished
from mergekit_pave.publish.card import CARD, write_card
from mergekit_pave.publish.store_card import store_card
from mergekit_pave.storage.covariances import MANIFEST, CovarianceStore
from mergekit_pave.storage.files import write_atomically

# Nothing hidden, nothing half-written.
NOT_PUBLISHED = [".*", "*/.*", "*.tmp", "*.lock", "__pycache__/*"]


def push_merge(
    folder: Path | str, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Complete the card of the merge in `folder`, upload it all, return the repository's URL.

    Raises:
        PaveError: no finished merge, a bad repository id, nobody logged in, a failed upload.
    """
    folder = Path(folder)
    token = check_target(repo_id, token)
    check_finished(folder)
    write_card(folder)
    again = f"mergekit-pave card {folder} --push {repo_id}"
    return _upload(folder, repo_id, "model", private, token, again, ignore_patterns=NOT_PUBLISHED)


def push_store(
    folder: Path | str, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Upload the covariance store in `folder` as a data set; return the repository's URL.

    A README.md that was edited, to say a licence perhaps, is published as it is.

    Raises:
        PaveError: no complete store, a bad repository id, nobody logged in, a failed upload.
    """
    token = check_target(repo_id, token)
    store = CovarianceStore(folder)
    card = store.folder / CARD
    text = store_card(store, repo_id)
    if not card.exists() or _is_unedited(card.read_text("utf-8"), store):
        write_atomically(card, lambda path: path.write_text(text, "utf-8"))
    files = [CARD, MANIFEST, "*.safetensors"]
    again = f"mergekit-pave publish {store.folder} {repo_id}"
    return _upload(store.folder, repo_id, "dataset", private, token, again, allow_patterns=files)


def _is_unedited(text: str, store: CovarianceStore) -> bool:
    """Whether a card is as an earlier upload wrote it, to another repository perhaps."""
    named = re.search(r"^ +covariance: (.+)$", text, re.MULTILINE)
    return bool(named) and text == store_card(store, named[1])


def check_target(repo_id: str, token: str | None = None) -> str:
    """The token to publish with; what can be known to fail before hours of work fails here.

    Raises:
        PaveError: `repo_id` is none, or nobody is logged in.
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


def _upload(
    folder: Path, repo_id: str, repo_type: str, private: bool, token: str, again: str, **patterns
) -> str:
    api = HfApi(token=token)
    try:
        # `None` leaves the choice to the owner's settings.
        url = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True)
        api.upload_folder(
            folder_path=str(folder), repo_id=url.repo_id, repo_type=repo_type,
            commit_message="Upload with mergekit-pave", **patterns,
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
            f"The upload to {repo_id} failed ({lines[0].rstrip('.')}); what has arrived is kept, "
            f"go on with `{again}`."
        ) from error
    return str(url)
