"""Running a merge as `mergekit-yaml` does, so that its result can be scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from safetensors import SafetensorError

from mergekit_pave.errors import PaveError
from mergekit_pave.models.source import LoaderOptions
from mergekit_pave.recipe.parameters import PARAMETERS
from mergekit_pave.recipe.reading import configuration

SEED = 0


def merge_to(raw: Mapping[str, Any], folder: Path, options: LoaderOptions, device: str) -> None:
    """Merge a configuration as `mergekit-yaml` does, without a card and progress bars.

    Raises:
        PaveError: mergekit cannot merge it, or the disk is full.
    """
    raw = _known(raw)
    import mergekit.merge
    from mergekit.options import MergeOptions

    # The same warnings for every candidate, some of a strength that only the search tries.
    warned = logging.getLogger("mergekit_pave.plugin")
    level = warned.level
    warned.setLevel(logging.ERROR)
    try:
        with writing(folder):
            mergekit.merge.run_merge(
                configuration(raw), str(folder),
                options=MergeOptions(
                    transformers_cache=options.cache_dir, lora_merge_cache=options.lora_merge_cache,
                    lora_merge_dtype=options.lora_merge_dtype, device=device,
                    trust_remote_code=options.trust_remote_code, random_seed=SEED, quiet=True,
                    write_model_card=False),
                config_source=yaml.safe_dump(dict(raw), sort_keys=False))
    except RuntimeError as error:
        if "--allow-crimes" not in str(error):
            raise
        raise PaveError(
            "The models are of different architectures, which mergekit merges with --allow-crimes "
            "alone; merge them so, and evaluate the output.") from error
    finally:
        warned.setLevel(level)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk, on which a candidate cannot be written to `folder`, into a `PaveError`.

    It names the place that the user knows: `folder` lies in a hidden one there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # Of a broken shard that is read it says something else.
        if isinstance(error, SafetensorError) and "serializing" not in str(error):
            raise
        raise PaveError(
            f"The merge cannot be written to {folder.parent.parent} "
            f"({getattr(error, 'strerror', None) or error}); what is scored is kept, run it again "
            "once there is room.") from error


def _known(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without calibration keys that its method does not know.

    They tell which rows are held out, and would be warned of in every merge.
    """
    method = raw.get("merge_method")
    if method not in {m.spec.name for m in merge_methods.registered_methods()}:
        return dict(raw)
    declared = {p.name for p in merge_methods.get(method).spec.parameters}

    def kept(part: Mapping[str, Any]) -> dict[str, Any]:
        own = part.get("parameters")
        if not isinstance(own, dict):
            return dict(part)
        return {**part, "parameters": {
            key: value for key, value in own.items() if key in declared or key not in PARAMETERS}}

    result = kept(raw)
    if isinstance(raw.get("models"), list):
        result["models"] = [kept(m) if isinstance(m, dict) else m for m in raw["models"]]
    return result
