"""The data card of a published covariance store: what it holds, and what it gives away."""

from __future__ import annotations

from collections import Counter

from huggingface_hub import DatasetCard, DatasetCardData

from mergekit_pave.algebra.papers import PAVE
from mergekit_pave.publish.markdown import rendered
from mergekit_pave.publish.record import fullness
from mergekit_pave.storage.covariances import FORMAT, CovarianceStore

FEW_ROWS = 10


def store_card(store: CovarianceStore, repo_id: str = "REPO_ID") -> str:
    """README.md of a published covariance store."""
    model, sites = store.manifest["model"], store.sites
    metadata = DatasetCardData(
        pretty_name=f"Layer input covariances of {model['id']}",
        tags=["pave", "mergekit", "covariance"],
        # There are no rows to show.
        viewer=False,
    )
    widths = Counter(site.width for site in sites.values())
    return DatasetCard(rendered(
        "store.md", metadata=metadata.to_yaml(), pave=PAVE, model=model,
        data=store.manifest["data"], sites=sites, weights=len(store.weights), format=FORMAT,
        shapes=", ".join(f"{count} of {w} x {w}" for w, count in sorted(widths.items())),
        repo_id=repo_id, fullness=fullness(store), few=FEW_ROWS,
        short=sum(site.count < site.width for site in sites.values()),
    )).content
