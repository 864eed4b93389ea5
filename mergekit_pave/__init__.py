"""Stronger merges of fine-tuned models, inside stock mergekit; PAVE (arXiv 2510.14697) among them.

Everything a notebook needs, imported when it is first asked for:

    register            make the methods known where Python's start-up hook has not run
    check_merge         what is wrong with a merge configuration, before anything is downloaded
    calibrate           compute a model's covariances on its own data, into a store on disk
    CovarianceStore     read one: the second moment of every linear layer's inputs
    evaluate            how much of each expert a merge keeps, on held-out rows, without labels
    tune                the strength at which it keeps most
    RowOptions          which rows those two look at
    load_task_model     one task's model of an EMR merge, in memory
    materialize         the same, as a model folder
    compress            store fine-tunes as low-rank differences from their base
    reconstruct         a model folder of one again
    write_card          complete the model card of a merge
    push_merge          upload a merge to the Hub
    push_store          upload a covariance store to the Hub
    subspace            the algebra of purification: second moment -> tail -> purified weight
    PaveError           what all of them raise, in one sentence

In memory, merge with mergekit's own `merge_state_dicts(models, "pave_ties", ...)`. This purifies
one weight `W` (out, in) by the second moment `C` (in, in) of its inputs:

    from mergekit_pave import subspace
    damped = subspace.damped(C, dampening_frac=0.01)
    tail = subspace.tail(W, damped, count=16)             # the least activated directions
    purified = subspace.purify(W, tail.basis)             # W - U (U^T W)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mergekit_pave.errors import PaveError

if TYPE_CHECKING:
    from mergekit_pave.algebra import subspace
    from mergekit_pave.calibration.stores import calibrate
    from mergekit_pave.check import check as check_merge
    from mergekit_pave.evaluation.run import evaluate
    from mergekit_pave.evaluation.setup import RowOptions
    from mergekit_pave.evaluation.tuned import tune
    from mergekit_pave.plugin import register
    from mergekit_pave.publish.card import write_card
    from mergekit_pave.publish.hub import push_merge, push_store
    from mergekit_pave.storage.covariances import CovarianceStore
    from mergekit_pave.tasks.compress import compress
    from mergekit_pave.tasks.emr import load_task_model, materialize
    from mergekit_pave.tasks.reconstruct import reconstruct

_PUBLIC = {
    "RowOptions": "evaluation.setup:RowOptions",
    "CovarianceStore": "storage.covariances:CovarianceStore",
    "calibrate": "calibration.stores:calibrate",
    "check_merge": "check:check",
    "compress": "tasks.compress:compress",
    "evaluate": "evaluation.run:evaluate",
    "load_task_model": "tasks.emr:load_task_model",
    "materialize": "tasks.emr:materialize",
    "push_merge": "publish.hub:push_merge",
    "push_store": "publish.hub:push_store",
    "reconstruct": "tasks.reconstruct:reconstruct",
    "register": "plugin:register",
    "subspace": "algebra.subspace",
    "tune": "evaluation.tuned:tune",
    "write_card": "publish.card:write_card",
}
__all__ = [
    "PaveError", "CovarianceStore", "RowOptions", "calibrate", "check_merge", "compress",
    "evaluate", "load_task_model", "materialize", "push_merge", "push_store", "reconstruct",
    "register", "subspace", "tune", "write_card",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
