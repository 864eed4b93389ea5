"""Publishing on the Hugging Face Hub: merged models, and covariance stores as data sets."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from mergekit_pave.card import CARD, write_card
from mergekit_pave.errors import PaveError
from mergekit_pave.papers import PAVE
from mergekit_pave.record import fullness
from mergekit_pave.store import FORMAT, MANIFEST, CovarianceStore, write_atomically

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Nothing hidden, nothing half-written.
NOT_PUBLISHED = [".*", "*/.*", "*.tmp", "*.lock", "__pycache__/*"]
FEW_ROWS = 10


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


def check_finished(folder: Path) -> None:
    """Raise `PaveError` unless `folder` holds a config and all of a model's weights."""
    if not (folder / "config.json").is_file():
        raise PaveError(f"{folder} holds no finished merge: it has no config.json; merge again.")
    shards = list(_shards(folder))
    complete = (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))
    there = [name for name in complete if (folder / name).is_file()]
    if len(there) > 1:
        raise PaveError(
            f"{folder} holds the weights of two merges ({there[0]} and {there[1]}): merge again "
            "into an empty folder."
        )
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        what = f"{missing[0]} is missing" if missing else "it has no weights"
        raise PaveError(f"{folder} holds no finished merge: {what}; merge again.")
    for name in shards:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise PaveError(
                    f"{folder / name} is cut short or damaged ({error}); merge again."
                ) from error


def _shards(folder: Path) -> Iterator[str]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                yield from sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise PaveError(f"{index} is damaged; merge again.") from error
        elif (folder / name).exists():
            yield name


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


@click.command("publish")
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private if it is created.")
def publish_command(store: str, repo_id: str, private: bool) -> None:
    """Publish a covariance STORE as a data set of the Hub, with a card.

    Others can then merge your model without its data, by `covariance: REPO_ID`. The card says
    what the statistics contain and what they give away; it is published as README.md, or STORE's
    own README.md if there is one.

    \b
    Example:
        mergekit-pave publish wizardmath-covariance me/wizardmath-covariance
    """
    click.echo(push_store(store, repo_id, private=private))


# --- the card of a store -------------------------------------------------------------------


def store_card(store: CovarianceStore, repo_id: str = "REPO_ID") -> str:
    """README.md of a published covariance store: contents, use, and what it gives away."""
    model, data = store.manifest["model"], store.manifest["data"]
    metadata = DatasetCardData(
        pretty_name=f"Layer input covariances of {model['id']}",
        tags=["pave", "mergekit", "covariance"],
        # There are no rows to show.
        viewer=False,
    )
    widths = Counter(site.width for site in store.sites.values())
    shapes = ", ".join(f"{count} of {w} x {w}" for w, count in sorted(widths.items()))
    where = "a local data set (not published)" if data["local"] else f"`{data['dataset']}`"
    if data.get("generated"):
        where = "text that the model generated itself"
    about = ", ".join(f"{k} {data[k]}" for k in ("config", "split", "seed") if data.get(k))
    return DatasetCard(f"""\
---
{metadata.to_yaml()}
---

# Layer input covariances of {model["id"]}

Uncentred second moments `X^T X / n` of the inputs of this model's linear layers on the data named
below, for purifying its task vector (PAVE, {PAVE.link}) when it is merged with
others: no data is needed for that any more.

## Contents

| | |
|---|---|
| model | `{model["id"]}`{f" at revision {model['revision']}" if model["revision"] else ""} |
| data | {where}, {about} |
| samples | {data.get("used", "-")} |
| tokens | {data["tokens"]:,} |
| covariances | {len(store.sites)} ({shapes}), float32, half of each symmetric matrix stored |
| linear weights they serve | {len(store.weights)} |
| format | mergekit-pave covariance store, version {FORMAT} |

`manifest.json` names every site, the weights that read it and the settings;
`fingerprints.safetensors` holds 512 values of each weight, so that the statistics are never used
with other weights.

## Use

With `pip install mergekit-pave`, in the configuration of a merge:

```yaml
merge_method: pave_ties
models:
  - model: {model["id"]}
    parameters:
      covariance: {repo_id}
```

## What it gives away

The store holds no text and no activations, only sums over all tokens, but sums of the data all
the same:

* {_fill(store)}
* Whoever has the model can compare the statistics with those of a text of theirs: it is
  thinkable to tell from them whether that text, or text much like it, was among the data
  (membership inference).
* The manifest holds hashes of the exact data. They do not reveal it, and they confirm a correct
  guess of the whole.

Do not publish statistics of data that is confidential, or of a few private documents.

## Licence

None is set. The statistics derive from the model and from the data: choose one that the licences
of both allow, and write it as `license:` into the head of this file.
""").content


def _fill(store: CovarianceStore) -> str:
    short = sum(site.count < site.width for site in store.sites.values())
    ratio = fullness(store)
    if short:
        return (
            f"**{short} of the {len(store.sites)} covariances come from fewer tokens than "
            f"features** (least: {ratio:.2f} tokens per feature). Such a matrix has exactly the "
            "span of its rows and determines them up to a rotation: single activations, and so "
            "the words behind them, can be partly reconstructed. More samples make it safer "
            "and better."
        )
    if ratio < FEW_ROWS:
        return (
            f"The smallest covariance has {ratio:.1f} tokens per feature. That is few: directions "
            "that only single tokens use may still stand out. More samples blur them."
        )
    return (
        f"Every covariance averages over at least {ratio:.0f} tokens per feature, so no single "
        "row can be read off; rare tokens with large activations may still leave a trace."
    )
