"""A model's calibration data as tensors, and the batches they are run in.

Nothing is ever padded: samples keep their own length, and a batch holds samples of exactly
one shape. Statistics therefore cannot depend on the batch size or on a padding side.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from mergekit_pave.calibration.encode import ImageEncoder, TextEncoder
from mergekit_pave.calibration.limits import main_input
from mergekit_pave.calibration.needs import missing_input
from mergekit_pave.calibration.rows import TOKENS, Rows, SkipRow, open_rows
from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import is_local, name_of
from mergekit_pave.recipe.parameters import CalibrationSpec

logger = logging.getLogger(__name__)
# Rows read in a row without a usable one among them before giving up on an endless stream.
GIVE_UP = 10_000


@dataclass(frozen=True)
class Samples:
    """Encoded calibration data, in the order of the draw.

    Attributes:
        items: each a forward pass's tensors without batch dimension: `input_ids: (length,)`,
            `token_type_ids: (length,)`, `decoder_input_ids: (target_length,)`,
            `pixel_values: (channels, height, width)`.
        digest: sha256 over the exact tensors, the content address of the data.
        tokens: tokens in all, those of decoders included; images count as one each.
        notes: where the data came from, for a manifest. Holds no text and no local folder.
    """

    items: tuple[dict[str, Tensor], ...]
    digest: str
    tokens: int
    notes: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """The data's part of a manifest."""
        return {**self.notes, "tokens": self.tokens, "digest": self.digest}


def load_samples(
    spec: CalibrationSpec,
    model_path: str | Path,
    config: PreTrainedConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
) -> Samples:
    """Draw `spec`'s rows and encode them with the tokenizer or processor of the model."""
    rows = open_rows(spec)
    loading = {
        "revision": revision or "main", "trust_remote_code": trust_remote_code,
        "cache_dir": cache_dir}
    encoder = encoder_of(rows, str(model_path), config, loading)
    items, indices, skipped, details = _encode(rows, encoder, spec.num_samples)
    _report(spec, name_of(str(model_path)), len(items), skipped, details)
    _show(items[0], encoder)
    return make_samples(items, spec, _notes(rows, encoder, indices, skipped))


def make_samples(
    items: Sequence[dict[str, Tensor]], spec: CalibrationSpec, notes: dict[str, Any]
) -> Samples:
    """Address the encoded data of `spec` by its content, and count it."""
    digests = [digest_of(item) for item in items]
    duplicates = len(items) - len(set(digests))
    if duplicates > 0.2 * len(items):
        logger.warning(
            "%d of the %d rows drawn from %s repeat another one; they add no directions.",
            duplicates, len(items), spec.dataset)
    tokens = sum(
        1 if "pixel_values" in item else _tokens(item) for item in items)
    notes = {**notes, "used": len(items), "duplicates": duplicates}
    return Samples(tuple(items), _hash("".join(digests).encode()), tokens, notes)


def batches(samples: Samples, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield every sample once, in batches of equal shape, the largest shapes first.

    The order depends on the samples alone. Text gets an `attention_mask` of ones, which
    spares models the guess at which tokens are padding.
    """
    return (batch for _, batch in stacked(samples.items, lambda size: batch_size))


def stacked(
    items: Sequence[dict[str, Tensor]], rows: Callable[[int], int]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Numbers of the items of each batch, and the batch, in the order of `batches`.

    `rows` says how many items go into one batch, by the entries of their largest tensor.
    """
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for i, item in enumerate(items):
        key = tuple(sorted((name, tuple(value.shape)) for name, value in item.items()))
        groups.setdefault(key, []).append(i)
    sizes = {key: [prod(shape) for _, shape in key] for key in groups}
    # Largest first: what does not fit in memory shows at once.
    for key in sorted(groups, key=lambda key: (-sum(sizes[key]), key)):
        group, step = groups[key], rows(max(sizes[key]))
        for start in range(0, len(group), step):
            chunk = group[start : start + step]
            batch = {name: torch.stack([items[i][name] for i in chunk]) for name, _ in key}
            if "input_ids" in batch:
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            yield chunk, batch


def encoder_of(
    rows: Rows, model: str, config: PreTrainedConfig, loading: dict[str, Any]
) -> TextEncoder | ImageEncoder:
    """What turns rows into tensors for a model; `loading` as in `load_tokenizer`."""
    _refuse_kind(rows, model, config)
    if rows.image or main_input(config) == "pixel_values":
        return _image_encoder(rows, model, config, loading)
    tokenizer = None
    if rows.columns[0] != TOKENS:
        tokenizer = load_tokenizer(model, loading)
    return TextEncoder(tokenizer, config, rows.columns, rows.spec.max_seq_length, model)


def _refuse_kind(rows: Rows, model: str, config: PreTrainedConfig) -> None:
    """Raise `PaveError` for rows of another kind than the model takes."""
    takes = main_input(config)
    if fault := missing_input(config, rows.image):
        raise PaveError(
            f"{model} does not run on {'images' if rows.image else 'text'} alone ({fault}), and "
            "calibration data can be one of them; give this model a `covariance` store, or use "
            "`calibration_dataset: none`.")
    if takes not in ("input_ids", "pixel_values"):
        raise PaveError(
            f"{model} takes {takes}, and calibration data can be text or images; give this "
            "model a `covariance` store.")
    if rows.image and takes == "input_ids":
        raise PaveError(
            f"{model} takes text, and {rows.spec.dataset!r} has images; name a column of text, or "
            "other data.")


def _image_encoder(
    rows: Rows, model: str, config: PreTrainedConfig, loading: dict[str, Any]
) -> ImageEncoder:
    if len(rows.columns) > 1:
        raise PaveError(
            f"{model} takes images, but text_column names {len(rows.columns)} columns; name the "
            "one that holds images.")
    processor = load_image_processor(model, rows.columns[0], loading)
    return ImageEncoder(processor, config, rows.columns[0], rows.folder, model)


def refuse_unusable(
    rows: Rows, model: str, config: PreTrainedConfig, loading: dict[str, Any]
) -> None:
    """Encode what a calibration would, of a stream one row: faults show before it begins.

    Raises:
        PaveError: as `load_samples`.
    """
    _encode(rows, encoder_of(rows, model, config, loading),
            1 if rows.streamed else rows.spec.num_samples)


def _encode(
    rows: Rows, encoder: TextEncoder | ImageEncoder, count: int
) -> tuple[list[dict[str, Tensor]], list[int | None], Counter[str], dict[str, str]]:
    """The first `count` usable rows of the draw, their indices, and the others' faults.

    An endless stream is given up after `GIVE_UP` unusable rows in a row.
    """
    items: list[dict[str, Tensor]] = []
    indices: list[int | None] = []
    skipped: Counter[str] = Counter()
    details: dict[str, str] = {}
    fruitless = 0
    for index, row in rows.draw():
        try:
            items.append(encoder(row))
        except SkipRow as reason:
            skipped[str(reason)] += 1
            details.setdefault(str(reason), reason.detail)
            fruitless += 1
            if fruitless >= GIVE_UP and (rows.streamed or not items):
                break
            continue
        fruitless = 0
        indices.append(index)
        if len(items) == count:
            break
    if not items:
        raise PaveError(
            f"calibration_dataset {rows.spec.dataset!r} has no usable row in text_column "
            f"{', '.join(rows.columns)!r} ({_reasons(skipped, details)}); name data that has some.")
    return items, indices, skipped, details


def _reasons(skipped: Counter[str], details: dict[str, str]) -> str:
    """Counts of the commonest reasons, with what was said of the first row of each."""
    return ", ".join(
        f"{reason}{' (' + details[reason] + ')' if details[reason] else ''}: {count}"
        for reason, count in skipped.most_common(5))


def _report(
    spec: CalibrationSpec, model: str, used: int, skipped: Counter[str], details: dict[str, str]
) -> None:
    if used < spec.num_samples:
        logger.warning(
            "%s: %s has %d usable rows, fewer than num_calibration_samples %d; using all of them.",
            model, spec.dataset, used, spec.num_samples)
    if skipped.total() > 0.01 * used:
        logger.warning("%s: skipped %d of the %d rows drawn from %s (%s).", model, skipped.total(),
                       used + skipped.total(), spec.dataset, _reasons(skipped, details))


def _show(item: dict[str, Tensor], encoder: TextEncoder | ImageEncoder) -> None:
    """Log the start of one sample, so that a wrong template or a doubled token shows."""
    if isinstance(encoder, TextEncoder) and encoder.tokenizer is not None:
        text = encoder.tokenizer.decode(item["input_ids"][:64])
        logger.info("First sample of %s: %r", encoder.model, text)


def _tokens(item: dict[str, Tensor]) -> int:
    return sum(
        item[name].numel() for name in ("input_ids", "decoder_input_ids") if name in item)


def digest_of(item: dict[str, Tensor]) -> str:
    """sha256 of an encoded row."""
    parts = hashlib.sha256()
    for name, value in sorted(item.items()):
        parts.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        parts.update(value.contiguous().numpy().tobytes())
    return parts.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _notes(
    rows: Rows,
    encoder: TextEncoder | ImageEncoder,
    indices: list[int | None],
    skipped: Counter[str],
) -> dict[str, Any]:
    spec = rows.spec
    notes = {
        "dataset": name_of(spec.dataset),
        "local": is_local(spec.dataset),
        "config": spec.config,
        "split": spec.split,
        "columns": list(rows.columns),
        "seed": spec.seed,
        "streamed": rows.streamed,
        "requested": spec.num_samples,
        "skipped": dict(sorted(skipped.items())),
        "rows": None if rows.streamed else _hash(",".join(map(str, indices)).encode()),
    }
    if isinstance(encoder, TextEncoder):
        notes["max_seq_length"] = encoder.limit
        notes["chat_template"] = encoder.chats > 0
    return notes


def load_tokenizer(model: str, loading: dict[str, Any]) -> Any:
    """The model's own tokenizer. `loading`: revision, trust_remote_code and cache_dir."""
    mend = "copy tokenizer.json and tokenizer_config.json there from the model it was made from"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **loading)
    except Exception as error:
        raise PaveError(
            f"No tokenizer could be loaded for {model} ({_first_line(error)}); {mend}."
        ) from error
    # Without files transformers returns an empty tokenizer, which maps every text to `unk`.
    names = set((getattr(type(tokenizer), "vocab_files_names", None) or {}).values())
    where = {key: loading[key] for key in ("revision", "cache_dir")}
    if names and not any(
        cached_file(
            model, name, **where, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False)
        for name in sorted(names | {"tokenizer.json", "tokenizer.model", "tekken.json"})
    ):
        raise PaveError(f"{model} has no tokenizer files; {mend}.")
    return tokenizer


def load_image_processor(model: str, column: str, loading: dict[str, Any]) -> Any:
    """The model's own image processor, for the images of `column`."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise PaveError(
            f"The calibration data of {model} are images, which need Pillow; run "
            "`pip install mergekit-pave[vision]`.") from error
    try:
        processor = AutoImageProcessor.from_pretrained(model, **loading)
    except Exception as error:
        raise PaveError(
            f"text_column {column!r} holds images, but no image processor could be "
            f"loaded for {model} ({_first_line(error)}); copy its preprocessor_config.json "
            "there, or name text data.") from error
    return processor


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().split("\n")
    return lines[0].strip().rstrip(".:") or type(error).__name__
