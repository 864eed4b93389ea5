"""What happens around mergekit's `run_merge`: checks before, records and clean folders after."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mergekit.common import ModelReference

from mergekit_pave.errors import PaveError
from mergekit_pave.methods.layers import shared_statistics
from mergekit_pave.publish import record
from mergekit_pave.recipe.reading import CONFIGURATION
from mergekit_pave.storage import masks

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)
_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?"
)
_ASIDE = ".earlier-merge"
Seen = dict[str, tuple[int, int, int]]


@contextmanager
def gives_way(out_path: Path | str) -> Iterator[None]:
    """What lay beside an earlier model goes when the merge inside begins to write weights.

    A merge that fails before it changes any leaves the earlier one as it was.
    """
    out = Path(out_path)
    before, aside = _weights(out), out / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    moved = [path.relative_to(out) for path in (*record.files(out), *masks.files(out))]
    for path in moved:
        _move(out / path, aside / path)
    _remove_if_empty(out / masks.FOLDER)
    try:
        yield
    except BaseException:
        if _weights(out) == before:
            for path in moved:
                _move(aside / path, out / path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, to)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def replaced(out_path: Path | str) -> Iterator[None]:
    """Weight files of an earlier merge are gone when the merge inside has ended well."""
    out = Path(out_path)
    before, merged = _weights(out), (out / CONFIGURATION).is_file()
    yield
    after = _weights(out)
    left = [out / name for name, seen in before.items() if after.get(name) == seen]
    if left and merged:
        for path in left:
            path.unlink()
    elif left:
        logger.warning(
            "%s holds weights that this merge has not written (%s): delete them, or they may be "
            "loaded instead.", out, ", ".join(path.name for path in left)
        )


def refuse_inputs(out_path: Path | str, models: Iterable[ModelReference]) -> None:
    """Raise `PaveError` where the merge would overwrite what it reads."""
    out = os.path.realpath(out_path)
    for model in models:
        for part in (model.model, model.lora):
            if part and os.path.isdir(part.path) and os.path.realpath(part.path) == out:
                raise PaveError(
                    f"{out_path} is the folder of {part.path}, which is to be merged; choose "
                    "another folder for the result."
                )


def _weights(folder: Path) -> Seen:
    """The weight files of a model folder, and what changes when one is written again."""
    if not folder.is_dir():
        return {}
    found = {f.name: f.stat() for f in folder.iterdir() if _WEIGHTS.fullmatch(f.name)}
    return {name: (s.st_mtime_ns, s.st_ino, s.st_size) for name, s in found.items()}


def _guard(module: ModuleType) -> None:
    """Check purified merges before `run_merge` downloads anything, and report afterwards.

    mergekit has no place for a method to see the whole configuration. The methods do not
    depend on this: without it the same mistakes are met later, or, for keys that mergekit
    drops, not at all.
    """
    original = _with_what_lies_beside(module.run_merge)

    @functools.wraps(original)
    def run_merge(merge_config, out_path, options, config_source=None):
        from mergekit import merge_methods

        from mergekit_pave import check
        from mergekit_pave.check.keys import ignored
        from mergekit_pave.check.models import Allowances
        from mergekit_pave.models.source import LoaderOptions
        from mergekit_pave.recipe.spelling import is_ours, looks_like_ours

        name = merge_config.merge_method
        if not is_ours(name) and not looks_like_ours(name):
            if warning := ignored(merge_config):
                logger.warning("%s", warning)
            return original(merge_config, out_path, options, config_source)
        loading = LoaderOptions(
            options.transformers_cache,
            options.lora_merge_cache,
            options.lora_merge_dtype,
            options.trust_remote_code,
        )
        allowed = Allowances(options.allow_crimes, options.unsafe_truncate_embeddings)
        refuse_inputs(out_path, merge_config.referenced_models())
        warnings = check.preflight(merge_config, config_source, loading, allowed)
        for warning in warnings:
            logger.warning("%s", warning)
        statistics = shared_statistics()
        statistics.reset()
        with replaced(out_path):
            result = original(merge_config, out_path, options, config_source)
        if options.write_model_card:
            record.write(out_path, record.of_merge(merge_config, statistics))
        # A method that looks at no covariance counts nothing.
        if any(statistics.counts.values()) and not options.quiet:
            treated = merge_methods.get(name).treated
            print(statistics.coverage(treated), file=sys.stderr)  # noqa: T201
        return result

    module.run_merge = run_merge


def _with_what_lies_beside(run_merge):
    """Take away what an earlier merge left beside its model; let this one write its task masks."""

    @functools.wraps(run_merge)
    def merge(merge_config, out_path, options, config_source=None):
        beside = masks.beside(out_path, merge_config, options)
        with gives_way(out_path), beside:
            return run_merge(merge_config, out_path, options, config_source)

    return merge


