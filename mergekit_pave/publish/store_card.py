"""The data card of a published covariance store."""

from __future__ import annotations

from collections import Counter

from huggingface_hub import DatasetCard, DatasetCardData

from mergekit_pave.algebra.papers import PAVE
from mergekit_pave.publish.record import fullness
from mergekit_pave.storage.covariances import FORMAT, CovarianceStore

FEW_ROWS = 10


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
