"""`calibration_dataset: self`: what the model itself writes, as calibration data.

The token ids are kept in the cache folder, never beside a store, which may be published.
Their address is what was asked of which model, so that finding them generates nothing; from
there on they are rows like any other, and covariances are addressed by their content.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig

from mergekit_pave.calibration.collect import NotFinite
from mergekit_pave.calibration.data import CalibrationSpec, Samples, make_samples
from mergekit_pave.calibration.finish import culprit
from mergekit_pave.calibration.folders import locked, make_folder
from mergekit_pave.calibration.generate import Form, form_of, write_rows
from mergekit_pave.calibration.limits import length_limit, refuse_unless_causal
from mergekit_pave.calibration.model import ModelSource, load_model
from mergekit_pave.calibration.processors import load_tokenizer
from mergekit_pave.calibration.resources import Resources, cache_folder
from mergekit_pave.errors import PaveError
from mergekit_pave.parameters import GENERATED
from mergekit_pave.store import write_atomically

logger = logging.getLogger(__name__)

# Tokens drawn per row at most: a forward pass each, which no row of a dataset costs.
LENGTH = 256
FORMAT = 1


def generated_samples(source: ModelSource, spec: CalibrationSpec, resources: Resources) -> Samples:
    """The rows that `spec` asks of this model, generated unless the cache has them.

    Raises:
        PaveError: no causal language model, or one that cannot begin a text.
    """
    config = source.config()
    refuse_unless_causal(config, source.label)
    tokenizer = load_tokenizer(source.tokenizer, {
        "revision": source.revision or "main", "trust_remote_code": source.trust_remote_code,
        "cache_dir": source.cache_dir})
    form = form_of(tokenizer, config, _generation(source, config), source.label)
    limit = length_limit(config, tokenizer, spec.max_seq_length)
    length = min(LENGTH, limit - len(form.opening))
    if length < 1:
        raise PaveError(
            f"{source.label} begins a text with {len(form.opening)} tokens, which leave no room "
            f"in the {limit} of max_seq_length or of the model; raise it, or name a dataset.")
    rows = _rows(source, spec, form, length, resources)
    logger.info("First sample of %s: %r", source.label, tokenizer.decode(rows[0][:64]))
    items = [{"input_ids": torch.tensor(row, dtype=torch.long)} for row in rows]
    return make_samples(items, spec, {
        "dataset": GENERATED,
        "generated": True,
        "local": False,
        "seed": spec.seed,
        "requested": spec.num_samples,
        "max_seq_length": len(form.opening) + length,
        "chat_template": form.chat,
    })


def _generation(source: ModelSource, config: PreTrainedConfig) -> GenerationConfig:
    """generation_config.json, where chat models name the ends of their turns."""
    try:
        return GenerationConfig.from_pretrained(source.path)
    except OSError:
        return GenerationConfig.from_model_config(config)


def _rows(
    source: ModelSource, spec: CalibrationSpec, form: Form, length: int, resources: Resources
) -> list[list[int]]:
    request = {
        "format": FORMAT, "model": source.identity(), "opening": form.opening,
        "bridge": form.bridge, "ends": form.ends, "length": length, "seed": spec.seed,
        "rows": spec.num_samples}
    key = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]
    folder = cache_folder() / "generated"
    path = folder / f"{key}.json"
    if (kept := _read(path)) is not None:
        return kept
    make_folder(folder)
    with locked(folder / f"{key}.lock"):
        if (kept := _read(path)) is not None:
            return kept
        rows = _generate(source, spec, form, length, resources, folder / f".offload-{key}")
        text = json.dumps({"request": request, "rows": rows})
        write_atomically(path, lambda file: file.write_text(text, "utf-8"))
    return rows


def _read(path: Path) -> list[list[int]] | None:
    try:
        return json.loads(path.read_text("utf-8"))["rows"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PaveError(
            f"The generated text {path} cannot be read ({error}); delete it.") from error


def _generate(
    source: ModelSource, spec: CalibrationSpec, form: Form, length: int, resources: Resources,
    scratch: Path,
) -> list[list[int]]:
    try:
        return write_rows(
            load_model(source, device=resources.device, max_memory=resources.max_memory,
                       scratch=scratch),
            form, spec.num_samples, length, spec.seed, spec.batch_size, source.label)
    except NotFinite as error:
        raise PaveError(culprit(source) or f"{source.label}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _release(resources.device)


def _release(device: torch.device) -> None:
    """Have the memory back before the same model is placed again, by what is free then."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
