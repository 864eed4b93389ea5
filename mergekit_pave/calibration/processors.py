"""Loading a model's own tokenizer or image processor, or saying why that is impossible."""

from __future__ import annotations

from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from mergekit_pave.errors import PaveError


def load_tokenizer(model: str, loading: dict[str, Any]) -> Any:
    """The model's own tokenizer. `loading`: revision, trust_remote_code and cache_dir."""
    mend = "copy tokenizer.json and tokenizer_config.json there from the model it was made from"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **loading)
    except Exception as error:
        raise PaveError(
            f"no tokenizer could be loaded for {model} ({_first_line(error)}); {mend}."
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
            f"the calibration data of {model} are images, which need Pillow; run "
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
