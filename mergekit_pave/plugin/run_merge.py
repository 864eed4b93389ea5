"""What happens around mergekit's `run_merge`: the recipe is checked, opened, merged, recorded."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import click
import torch
from mergekit import merge_methods
from mergekit.architecture import ModelArchitecture
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from tqdm.contrib.logging import logging_redirect_tqdm

from mergekit_pave import check
from mergekit_pave.check.keys import ignored
from mergekit_pave.check.models import Allowances
from mergekit_pave.check.planned import architecture
from mergekit_pave.errors import PaveError
from mergekit_pave.methods.base import StatefulMethod
from mergekit_pave.methods.layers import MergeState
from mergekit_pave.models.folder import copy_beside, has_tokenizer
from mergekit_pave.models.own_files import untie
from mergekit_pave.models.planned import completed
from mergekit_pave.models.source import LoaderOptions, ModelSource, model_source
from mergekit_pave.plugin import mends
from mergekit_pave.plugin.loaders import close_earlier, open_adapted
from mergekit_pave.plugin.opening import keep_own_files, open_state, writes_masks
from mergekit_pave.plugin.output import is_replaced_whole, refuse_inputs, taking_the_place
from mergekit_pave.publish import record
from mergekit_pave.recipe.parameters import DATA_FREE, GENERATED
from mergekit_pave.recipe.recipe import Recipe
from mergekit_pave.recipe.spelling import is_ours, looks_like_ours
from mergekit_pave.storage.masks import refuse_others

logger = logging.getLogger(__name__)

# The copy of a method that the merge of this context works with. A planner takes it over in the
# thread that called `run_merge`; worker threads find it in mergekit's registry, by its own name.
_METHOD: ContextVar[StatefulMethod | None] = ContextVar("method", default=None)
# The architecture that mergekit plans the merge of this context by.
_ARCHITECTURE: ContextVar[ModelArchitecture | None] = ContextVar("architecture", default=None)


def attach(module: Any) -> None:
    """Wrap `run_merge` of `mergekit.merge`, and the planner that it uses.

    mergekit has no place for a method to see the whole configuration. A merge that is started
    otherwise still runs, on tensors in memory or with stores that its configuration names.
    """
    run_merge = module.run_merge
    signature = inspect.signature(run_merge)

    @functools.wraps(run_merge)
    def around(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given: dict[str, Any] = {
            name: bound.arguments.get(name) for name in signature.parameters}
        known = {"merge_config", "out_path", "options"} <= given.keys()
        # Where mergekit names its arguments otherwise, it merges without our additions.
        if not known:
            return run_merge(*args, **kwargs)

        def merge(out: Path, options: MergeOptions) -> Any:
            bound.arguments |= {"out_path": str(out), "options": options}
            return run_merge(*bound.args, **bound.kwargs)

        with _lines_above_bars():
            return _around(
                merge, given["merge_config"], given["out_path"], given["options"],
                given.get("config_source"),
            )

    module.run_merge = around
    mends.let_planner_ask(module.MergePlanner, _METHOD.get)
    mends.let_merges_know(module, _ARCHITECTURE.get)


def read_clearly(script: Any) -> None:
    """Let `mergekit-yaml` say in one sentence what it cannot read of a configuration of ours.

    It ends in pydantic's complaint below a traceback, before `run_merge`.
    """
    own = script.MergeConfiguration

    class Reader:
        @staticmethod
        def model_validate(raw: Any) -> MergeConfiguration:
            try:
                return own.model_validate(raw)
            except (ValueError, RuntimeError):
                name = str(raw.get("merge_method")) if isinstance(raw, dict) else ""
                if is_ours(name) or looks_like_ours(name):
                    for found in check.check(raw):
                        if found.level == "error":
                            raise PaveError(str(found)) from None
                raise

    script.MergeConfiguration = Reader


@contextmanager
def _lines_above_bars() -> Iterator[None]:
    """Warnings appear above a progress bar, not at its end.

    The handlers of logging belong to all threads, so only the main one's merge exchanges them.
    """
    main = threading.current_thread() is threading.main_thread()
    with logging_redirect_tqdm() if main else nullcontext():
        yield


def _around(
    merge: Callable[[Path, MergeOptions], Any], config: MergeConfiguration, out_path: Path | str,
    options: MergeOptions, source: str | None,
) -> Any:
    close_earlier(config)
    name = config.merge_method
    if not is_ours(name) and not looks_like_ours(name):
        if warning := ignored(config):
            logger.warning("%s", warning)
        if not is_replaced_whole(out_path):
            return merge(Path(out_path), options)
        with taking_the_place(out_path) as out:
            return merge(out, options)
    loading = LoaderOptions.of(options)
    refuse_inputs(out_path, config.referenced_models())
    _refuse_device(options)
    allowed = Allowances(options.allow_crimes, options.unsafe_truncate_embeddings)
    # A caller's default device is for its own tensors.
    with torch.device("cpu"):
        recipe = Recipe.as_written(config, source)
        for warning in check.preflight(recipe, loading, allowed):
            logger.warning("%s", warning)
        LoaderCache().setup(options=options)
        # Downloads the models, so that one that does not fit is refused before any is calibrated.
        planned = architecture(recipe, loading, allowed, options.lazy_unpickle)
        open_adapted(config, options)
    entries = recipe.inputs  # before mergekit's planner rewrites the configuration
    folders = _folders(config, loading)
    if writes_masks(entries):
        refuse_others(out_path)
    with taking_the_place(out_path) as out:
        with torch.device("cpu"):
            state = open_state(recipe, out, options, loading)
        with _method_of(name, state), _planned_as(planned):
            result = merge(out, options.model_copy(update={
                "copy_tokenizer": options.copy_tokenizer and has_tokenizer(folders[0])}))
        if (out / "config.json").is_file():
            copy_beside(folders, out)
        with torch.device("cpu"):
            untie(completed(out, config, loading))
            _refuse_overflow(out, config.out_dtype or config.dtype)
        if state.masks:
            keep_own_files(state.masks, entries, out, loading)
            state.masks.finish()
        if options.write_model_card:
            record.write(out, record.of_merge(recipe, state))
    if not options.quiet:
        data = {entry.get("calibration_dataset") for entry in entries}
        say_what_is_done(out_path, name, state, has_data=not data & {None, DATA_FREE, GENERATED})
    return result


def _refuse_device(options: MergeOptions) -> None:
    """Raise `PaveError` for an accelerator that is not there, before a model is calibrated."""
    device = torch.device(options.device or "cpu").type
    found = torch.accelerator.is_available()
    there = torch.accelerator.current_accelerator() if found else None
    if device != "cpu" and (there is None or there.type != device):
        raise PaveError(f"PyTorch finds no {device} device here: leave --{device} out, or install "
                        "a PyTorch that supports it.")
    if options.multi_gpu and there is None:
        raise PaveError("PyTorch finds no accelerator here: leave --multi-gpu out.")


def _refuse_overflow(out: Path, dtype: str | None) -> None:
    """Raise `PaveError` where a weight of the merge is beyond float16, whose largest is 65504."""
    if (dtype or "").removeprefix("torch.") != "float16":
        return
    for name, tensor in ModelSource(str(out), out.name, str(out)).tensors():
        if not tensor.isfinite().all():
            raise PaveError(f"{name} of the merge is too large for float16: set dtype, or "
                            "out_dtype, to bfloat16 or float32.")


def _folders(config: MergeConfiguration, loading: LoaderOptions) -> list[Path]:
    """The models' folders, the first the one that mergekit takes config and tokenizer from."""
    models = [config.base_model, *config.referenced_models()]
    named = dict.fromkeys(model for model in models if model is not None)
    sources = (model_source(model, loading, unmerged=True) for model in named)
    return [Path(source.path) for source in sources]


@contextmanager
def _method_of(name: str, state: MergeState) -> Iterator[None]:
    """mergekit's planner gets a copy of the method that holds the state of this merge."""
    method = merge_methods.get(name)
    if not isinstance(method, StatefulMethod):
        yield
        return
    own = method.within(state, f"{name}-{uuid.uuid4().hex[:8]}")
    merge_methods.register(own)
    token = _METHOD.set(own)
    try:
        yield
    finally:
        _METHOD.reset(token)
        mends.unregister(own)


@contextmanager
def _planned_as(planned: ModelArchitecture) -> Iterator[None]:
    token = _ARCHITECTURE.set(planned)
    try:
        yield
    finally:
        _ARCHITECTURE.reset(token)


def say_what_is_done(out_path: Path | str, name: str, state: MergeState, has_data: bool) -> None:
    """The last lines of a merge: what it did, and the command that says what it is worth."""
    # A method that looks at no covariance counts nothing.
    if any(state.counts.values()):
        click.echo(state.coverage(merge_methods.get(name).treated), err=True)
    if state.masks and state.masks.tensors:
        click.echo(
            f"mergekit-pave: {out_path} holds the weights that all tasks share, and masks for "
            f"{len(state.masks.tasks)} tasks; `mergekit-pave materialize {out_path} TASK DIR` "
            "writes a task's model.",
            err=True,
        )
        return
    rows = "" if has_data else ", with --held-out ROWS for each model,"
    click.echo(f"mergekit-pave: {out_path} is complete. `mergekit-pave evaluate {out_path}`{rows} "
               "says how much of each model it keeps.", err=True)
