"""One row of a dataset to the tensors that one model's forward pass takes.

An encoder is called with a row and returns a sample: tensors without a batch dimension and
without padding, such as `input_ids: (length,)`. It raises `SkipRow` for a row that holds
nothing usable, and `PaveError` for data of the wrong kind.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedConfig

from mergekit_pave.calibration.chat import is_chat, normalise, shape, written
from mergekit_pave.calibration.limits import (
    decoder_start,
    is_text_encoder,
    length_limit,
    text_configs,
)
from mergekit_pave.calibration.rows import CHAT_COLUMNS, MASK, TOKENS, SkipRow
from mergekit_pave.errors import PaveError

logger = logging.getLogger(__name__)
# Columns of labels mark padding with this id.
IGNORED_LABEL = -100


@dataclass
class TextEncoder:
    """Text, sentence pairs, chats and token ids, for encoders, decoders and both.

    Several columns: an encoder-decoder reads the first with its encoder and the second with
    its decoder (a single column feeds both); BERT and its kin take two as a sentence pair;
    columns of messages (`prompt`, `completion`) make one chat; elsewhere they are joined by
    newlines, leaving out empty ones. Beside text a number is read as it is written.

    Attributes:
        tokenizer: the model's own; `None` when the rows hold token ids already.
        chats: rows that went through the chat template so far.
    """

    tokenizer: Any
    config: PreTrainedConfig
    columns: tuple[str, ...]
    max_seq_length: int
    model: str
    chats: int = 0

    def __post_init__(self) -> None:
        if self.config.is_encoder_decoder and len(self.columns) > 2:
            raise PaveError(
                f"text_column names {len(self.columns)} columns, but {self.model} is an "
                "encoder-decoder; name one for both sides, or `source,target`.")

    def __call__(self, row: dict[str, Any]) -> dict[str, Tensor]:
        values = [row[column] for column in self.columns]
        mask = row.get(MASK)
        if self.config.is_encoder_decoder:
            inputs = self._encode(values[0], self.columns[0], mask)
            target = self._encode(values[-1], self.columns[-1], mask, target=len(values) == 2)
            inputs["decoder_input_ids"] = self._shift(target["input_ids"])
        elif len(values) == 1:
            inputs = self._encode(values[0], self.columns[0], mask)
        elif any(isinstance(value, list) and value for value in values):
            inputs = self._one_chat(values)
        elif len(values) == 2 and is_text_encoder(self.config):
            inputs = self._tokenize(*(self._text(self._part(value)) for value in values))
        else:
            inputs = self._tokenize(self._join(values))
        self._check(inputs)
        return {name: torch.tensor(ids, dtype=torch.long) for name, ids in inputs.items()}

    @cached_property
    def limit(self) -> int:
        return length_limit(self.config, self.tokenizer, self.max_seq_length)

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    @cached_property
    def _takes_token_types(self) -> bool:
        return (getattr(self.config.get_text_config(), "type_vocab_size", None) or 0) > 1

    def _encode(
        self, value: Any, column: str, mask: Any = None, target: bool = False
    ) -> dict[str, list[int]]:
        if isinstance(value, list) and value:
            if all(type(token) is int for token in value):
                return {"input_ids": self._kept(value, mask if column == TOKENS else None)}
            if is_chat(value) and self.tokenizer is not None:
                return self._chat(value, column)
        unread = isinstance(value, (dict, list)) or (
            # A chat that was stored as a JSON string is not prose.
            isinstance(value, str) and (column in CHAT_COLUMNS or self.tokenizer is None))
        if unread and value:
            raise self._not_readable(value, column)
        return self._tokenize(self._text(value), target=target)

    def _not_readable(self, value: Any, column: str) -> PaveError:
        return PaveError(
            f"text_column {column!r} holds {shape(value)}, which cannot be read for "
            f"{self.model}; name a column of strings, of token ids, or of messages "
            "[{'role': str, 'content': str}, ...].")

    def _text(self, value: Any) -> str:
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise SkipRow("empty")
        if not isinstance(value, str):
            raise SkipRow("not text", shape(value))
        return value

    def _part(self, value: Any) -> Any:
        """A number in one of several columns, such as an answer, as it is written."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a CSV column of whole numbers with gaps comes as floats
        return str(value) if type(value) in (int, float) else value

    def _join(self, values: list[Any]) -> str:
        # Empty parts are usual in instruction data, whose `input` is optional.
        parts = [self._part(value) for value in values if value is not None and value != ""]
        for part in parts:
            if not isinstance(part, str):
                raise SkipRow("not text", shape(part))
        return self._text("\n".join(part for part in parts if part.strip()))

    def _one_chat(self, values: list[Any]) -> dict[str, list[int]]:
        """The messages of several columns as one chat: of `prompt` and `completion`, say."""
        full = [(value, column) for value, column in zip(values, self.columns, strict=True)
                if value is not None and value != []]
        for value, column in full:
            if not is_chat(value) or self.tokenizer is None:
                raise self._not_readable(value, column)
        return self._chat([m for value, _ in full for m in value], ",".join(self.columns))

    def _kept(self, ids: list[int], mask: list[int] | None) -> list[int]:
        """Token ids without the padding that the dataset came with."""
        if mask is not None:
            if len(mask) != len(ids):
                raise SkipRow("attention_mask of another length")
            ids = [token for token, keep in zip(ids, mask, strict=True) if keep]
        return [token for token in ids if token != IGNORED_LABEL][: self.limit]

    def _chat(self, messages: list[dict[str, Any]], column: str) -> dict[str, list[int]]:
        messages = normalise(messages)
        self.chats += 1
        if self.tokenizer.chat_template is None:
            raise PaveError(
                f"text_column {column!r} holds chats, but the tokenizer of {self.model} has no "
                "chat template; add a chat_template.jinja to the model's folder, or name a "
                "column of plain text.")
        try:
            text = written(self.tokenizer, messages)
        except TemplateError as error:
            raise SkipRow("refused by the chat template", str(error)) from error
        except Exception as error:
            raise PaveError(
                f"The chat template of {self.model} cannot format text_column {column!r} "
                f"({type(error).__name__}: {error}); the row is {shape(messages)}.") from error
        # The template writes the special tokens itself, the first one included.
        return self._tokenize(self._text(text), add_special_tokens=False)

    def _tokenize(
        self, text: str, pair: str | None = None, *, target: bool = False,
        add_special_tokens: bool = True,
    ) -> dict[str, list[int]]:
        if add_special_tokens and self._adds_bos:
            text = text.removeprefix(self.tokenizer.bos_token)
        encoded = self.tokenizer(
            **({"text_target": text} if target else {"text": text, "text_pair": pair}),
            add_special_tokens=add_special_tokens, padding=False,
            truncation=True, max_length=self.limit)
        # Tokenizers ignore a limit that is below the number of special tokens of a pair.
        ids = encoded["input_ids"][: self.limit]
        if set(ids) <= set(self.tokenizer.all_special_ids):
            raise SkipRow("no token that the tokenizer knows")
        inputs = {"input_ids": ids}
        if self._takes_token_types and "token_type_ids" in encoded:
            inputs["token_type_ids"] = encoded["token_type_ids"][: self.limit]
        return inputs

    def _shift(self, target: list[int]) -> list[int]:
        return [decoder_start(self.config, self.model), *target[:-1]]

    def _check(self, inputs: dict[str, list[int]]) -> None:
        if len(inputs["input_ids"]) < 2:
            raise SkipRow("fewer than 2 tokens")
        encoder, decoder = text_configs(self.config)
        for name, config in (("input_ids", encoder), ("decoder_input_ids", decoder)):
            rows = getattr(config, "vocab_size", None)
            smallest, largest = (pick(inputs.get(name) or [0]) for pick in (min, max))
            if smallest < 0:
                raise PaveError(
                    f"The rows for {self.model} hold the token id {smallest}; where that is "
                    "padding, say so in a column attention_mask, or take it out.")
            if rows is not None and largest >= rows:
                source = (
                    "the rows hold" if self.tokenizer is None
                    else f"its tokenizer ({type(self.tokenizer).__name__}) gives")
                raise PaveError(
                    f"{self.model} has {rows} embedding rows, but {source} the token id "
                    f"{largest}; use the tokenizer that belongs to these weights.")


@dataclass(frozen=True)
class ImageEncoder:
    """Images through the model's own processor.

    A value is what `datasets` gives for an image (`{"bytes", "path"}`), a path (absolute, or
    relative to `folder`, or to the working directory) or a PIL image.
    """

    processor: Any
    config: PreTrainedConfig
    column: str
    folder: Path | None
    model: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Tensor]:
        mode = "L" if getattr(self.config, "num_channels", 3) == 1 else "RGB"
        image = self._open(row[self.column], mode)
        try:
            pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        except Exception as error:  # such as an image one pixel wide
            raise SkipRow("refused by the image processor", str(error)) from error
        if pixels.dim() != 4 or len(pixels) != 1:
            raise PaveError(
                f"The image processor of {self.model} cuts an image into {tuple(pixels.shape)}, "
                "which is not supported; give this model a `covariance` store or text data.")
        return {"pixel_values": pixels[0]}

    def _open(self, value: Any, mode: str) -> Any:
        import datasets
        from PIL import Image

        if isinstance(value, Image.Image):
            return value.convert(mode)
        if not value:
            raise SkipRow("empty")
        if isinstance(value, str):
            value = {"path": self._path(value), "bytes": None}
        if not isinstance(value, dict) or not {"path", "bytes"} & value.keys():
            raise self._not_an_image(value)
        try:
            image = datasets.Image().decode_example({"path": None, "bytes": None, **value})
            return image.convert(mode)
        # Pillow's readers raise whatever a broken header leads to: SyntaxError, struct.error,
        # DecompressionBombError, ...
        except Exception as error:
            raise SkipRow("not a readable image", type(error).__name__) from error

    def _path(self, value: str) -> str:
        from PIL import Image

        if Path(value).suffix.lower() not in Image.registered_extensions():
            raise self._not_an_image(value)
        inside = Path(value) if self.folder is None else self.folder / value
        return str(inside if inside.exists() else value)

    def _not_an_image(self, value: Any) -> PaveError:
        return PaveError(
            f"{self.model} takes images, but text_column {self.column!r} holds "
            f"{'text' if isinstance(value, str) else shape(value)}; name a dataset and a column "
            "with images.")
