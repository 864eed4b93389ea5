"""The files of a fine-tune beside its weights, for a merge that gives the fine-tune back.

The config holds labels, rope and end token, and the tokenizer the vocabulary. The merged model has
those of the base, so a task's model needs its own.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from transformers import PretrainedConfig
from transformers.utils import cached_file

from mergekit_pave.models.checkpoint import Checkpoint
from mergekit_pave.models.folder import companions, public
from mergekit_pave.models.source import ModelSource, tokenizer_folder
from mergekit_pave.storage.files import write_bytes

logger = logging.getLogger(__name__)
CONFIG, _GENERATION = "config.json", "generation_config.json"
_PROCESSOR = re.compile(r"\w*processor(_config)?\.json")
_CODE = re.compile(r".*\.py")
_OF_TENSORS = {"dtype", "n_layer", "num_decoder_layers", "num_hidden_layers", "num_layers",
               "tie_word_embeddings", "vocab_size"}
_OF_VOCABULARY = {"bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id",
                  "pad_token_id", "sep_token_id"}
# mergekit does not download them with a repository.
_SMALL = ("chat_template.jinja", "merges.txt", "vocab.txt")


def own_files(
    source: ModelSource, base: PretrainedConfig, merged: Path, rearranges: bool
) -> dict[str, bytes | None]:
    """Config, tokenizer and their like of one fine-tune, as its model in a merge needs them.

    Args:
        source: the fine-tune.
        base: the config of the base.
        merged: folder of the finished merge.
        rearranges: the merge has a vocabulary of its own, and so its tokenizer.

    Returns:
        The content by name; `None` where it is that of the merged model's file.
    """
    there, own = companions(merged), _companions(source)
    words = {name for name in own if _of_tokenizer(name)}
    if rearranges or not words:
        own = {name: file for name, file in own.items() if name not in words}
        own |= {name: file for name, file in there.items() if _of_tokenizer(name)}
    if rearranges and _GENERATION in own:  # its tokens have other numbers now
        del own[_GENERATION]
    for kind in (_PROCESSOR, _CODE):
        if not any(kind.fullmatch(name) for name in own):
            own |= {name: file for name, file in there.items() if kind.fullmatch(name)}
    contents = {name: file.read_bytes() for name, file in own.items()}
    contents[CONFIG] = _config(source.config(), base, _loaded(merged, source), rearranges)
    contents = {name: public(name, content) for name, content in contents.items()}
    same = {name for name, file in there.items() if file.read_bytes() == contents.get(name)}
    return {name: None if name in same else content for name, content in contents.items()}


def _companions(source: ModelSource) -> dict[str, Path]:
    """Companions from the folder of the weights and, if it is another, that of the tokenizer."""
    found = companions(Path(source.path))
    folder = tokenizer_folder(source)
    if folder is None:
        return found
    if not os.path.isdir(source.tokenizer):
        for name in _SMALL:
            cached_file(
                source.tokenizer, name, revision=source.revision, cache_dir=source.cache_dir,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False)
    words = {n: file for n, file in companions(folder).items() if _of_tokenizer(n)}
    return {n: file for n, file in found.items() if not (words and _of_tokenizer(n))} | words


def _of_tokenizer(name: str) -> bool:
    other = name in (CONFIG, _GENERATION) or _PROCESSOR.fullmatch(name) or _CODE.fullmatch(name)
    return not other


def _loaded(folder: Path, like: ModelSource) -> PretrainedConfig:
    return ModelSource(
        str(folder), like.label, str(folder), trust_remote_code=like.trust_remote_code).config()


def _config(
    own: PretrainedConfig, base: PretrainedConfig, merged: PretrainedConfig, rearranges: bool
) -> bytes:
    """The fine-tune's config, with what the tensors of the merge ask for, and what the merge has
    changed in the base's."""
    values = own.to_dict()
    always = _OF_TENSORS | (_OF_VOCABULARY if rearranges else set())
    _carry(base.to_dict(), merged.to_dict(), values, always)
    return (type(own).from_dict(values).to_json_string(use_diff=True)).encode()


def untie(merged: Checkpoint) -> None:
    """Say in a merge's config that its head is not tied, where a model brought one of its own.

    transformers 5 loads both tensors of such a pair; other programs believe the config.
    """
    config = merged.config
    if config.is_encoder_decoder:  # of which T5 scales the outputs of a tied head
        return
    loader = LazyTensorLoader(ShardedTensorIndex.from_disk(str(merged.folder)))
    for name, source in merged.copies.items():
        if not torch.equal(loader.get_tensor(name), loader.get_tensor(source)):
            file = merged.folder / CONFIG
            values = json.loads(file.read_text("utf-8"))
            for part in (values, values.get("text_config") or {}):
                part["tie_word_embeddings"] = False
            write_bytes(file, (json.dumps(values, indent=2) + "\n").encode())
            logger.warning(
                "%s of the merge is not %s, to which the base ties it: its config.json says so "
                "with tie_word_embeddings: false.", name, source)
            return


def _carry(
    before: Mapping[str, Any], after: Mapping[str, Any], values: dict[str, Any], always: set[str]
) -> None:
    """Make in `values` the changes that lead from `before` to `after`, and all of `always`."""
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and isinstance(values.get(key), dict):
            _carry(old, value, values[key], always)
        elif value != old or key in always:
            values[key] = value
