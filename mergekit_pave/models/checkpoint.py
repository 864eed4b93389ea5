"""One model of a merge as its files have it, and whether they hold all that its class needs."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from mergekit_pave.models.headers import Header, folder_of, headers, is_downloaded
from mergekit_pave.models.layers import empty_model
from mergekit_pave.models.renaming import ClassNames, is_buffer
from mergekit_pave.models.source import LoaderOptions, model_source

# As safetensors and torch call their dtypes.
_INTEGER = re.compile(r"[IU]\d|u?int|bool", re.IGNORECASE)
_SMALL = re.compile(r"F[48]|float[48]", re.IGNORECASE)
_PACKED = re.compile(r"\.(qweight|qzeros|weight_packed|SCB|absmax|quant_state\S*)$")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One model of a merge: what its files hold, and what its class makes of it.

    `own` is `None` where the class cannot be built without the weights.
    """

    label: str
    folder: Path
    config: PretrainedConfig
    headers: Mapping[str, Header]
    own: ClassNames | None

    def is_harmless(self, name: str) -> bool:
        """Whether nothing is lost without that tensor."""
        if self.own is None:
            return is_buffer(name)
        if self.own.ignores(name):
            return True
        return any(own in self.own.tied for own in self.own.of(name))

    @property
    def copies(self) -> dict[str, str]:
        """The files' tensors that the class ties to others in the files: tensor -> original."""
        stored = {self.own.one(name): name for name in self.headers} if self.own else {}
        return {stored[tied]: stored[source] for tied, source in self.own.tied.items()
                if tied in stored and source in stored} if self.own else {}

    @property
    def random(self) -> list[str]:
        """Tensors of the class that no file has: transformers starts them at random."""
        return self.own.missing(self.headers) if self.own else []


def read(model: ModelReference, options: LoaderOptions) -> Checkpoint | None:
    """A model's checkpoint by its headers; `None` where its files are not on this machine yet.

    Of a model with an adapter that is the copy it is merged into, which a check does not make;
    without a place for copies, the model alone, whose names and shapes are the same.

    Raises:
        PaveError: files that are missing, damaged, or fit no index. The message names the file.
    """
    if model.lora and options.lora_merge_cache:
        return None
    folder = folder_of(model.model, options.cache_dir)
    if folder is None or not (Path(model.model.path).exists() or is_downloaded(folder)):
        return None
    return checkpoint(folder, str(model), model.config(options.trust_remote_code), options)


def fetched(model: ModelReference, options: LoaderOptions) -> Checkpoint:
    """A model's checkpoint by its headers, downloaded and merged if need be; errors as `read`."""
    folder = Path(model_source(model, options, unmerged=True).path)
    return checkpoint(folder, str(model), model.config(options.trust_remote_code), options)


def checkpoint(
    folder: Path, label: str, config: PretrainedConfig, options: LoaderOptions
) -> Checkpoint:
    """What the files of a local folder hold; errors as `read`."""
    found = headers(folder)
    try:
        own: ClassNames | None = ClassNames(empty_model(config, options.trust_remote_code))
    except Exception as error:  # whatever a model's code cannot do without values
        logger.info("The class of %s cannot be built without weights: %s", label, error)
        own = None
    return Checkpoint(label, folder, config, found, own)


def incomplete(item: Checkpoint) -> tuple[str | None, str | None]:
    """What to say of a checkpoint that does not fit its class: an error, and a warning.

    A model without weights of its body is unusable; a head may belong to another task.
    """
    if item.own is None:
        return None, None
    random, cls = item.random, item.own.label
    for name, header in item.headers.items():
        own = item.own.one(name) or ""
        there = item.own.shape(own)
        small = _SMALL.match(header.dtype)
        if (small or _INTEGER.match(header.dtype)) and item.own.is_floating(own):
            what = "numbers that need a scale" if small else "integers"
            return (f"{name} of {item.label} holds {what} ({header.dtype}), as quantised weights "
                    "do: name the full-precision checkpoint."), None
        if there not in (None, header.shape):
            return (f"{name} of {item.label} is {header.shape}, and by its config {there}: correct "
                    "config.json, or download or save that checkpoint again."), None
    if not random:
        return None, None
    body = [name for name in random if item.own.in_body(name)]
    unknown = [name for name in item.headers if not item.own.of(name)]
    if not body:
        names = ", ".join(random[:3]) + (", ..." if random[3:] else "")
        text = (f"{item.label} has no weights for {names} of its class {cls}: transformers "
                "starts them at random")
        other = next((name for name in unknown for own in random if name.endswith(f".{own}")
                      and item.headers[name].shape == item.own.shape(own)), None)
        if other is None:
            return None, f"{text}."
        mend = _renaming(unknown, item.headers, item.own)
        return f"{text}; it has {other}, which {cls} does not know: {mend}.", None
    text = f"{item.label} lacks {len(body)} of the weights of its class {cls}, such as {body[0]}"
    if unknown:
        mend = _renaming(unknown, item.headers, item.own)
        return f"{text}; it has {unknown[0]}, which {cls} does not know: {mend}.", None
    return f"{text}; download or save that checkpoint again.", None


def _renaming(unknown: Sequence[str], names: Collection[str], own: ClassNames) -> str:
    """How a user can mend names that the class does not know."""
    if any(map(_PACKED.search, unknown)):
        return "those are quantised weights, name the full-precision checkpoint"
    prefix = unknown[0].split(".")[0] + "."
    if all(name.startswith(prefix) for name in names):
        stripped = [name.removeprefix(prefix) for name in names]
        if not own.missing(stripped):
            return f"take the prefix `{prefix}` off all names in its files"
    return ("correct `architectures` in its config.json, or save it again with save_pretrained "
            "from the class that it was trained with")
