"""Writing a folder as a whole, and the files of a model folder beside its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import is_local, name_of
from mergekit_pave.storage.files import write_atomically

_COMPANIONS = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|chat_template|vocab|\w*tokenizer\w*"
    r"|\w*processor(_config)?)\.json|.*\.(py|model|jinja|tiktoken|spm)|(vocab|merges)\.txt"
    # Of single tokenizers, as transformers' `vocab_files_names` lists them.
    r"|(tekken|entity_vocab|target_vocab|vocab-(src|tgt)|normalizer|emoji|byte_maps|word_shape"
    r"|word_pronunciation)\.json|dict\.txt|bpe\.codes|prophetnet\.tokenizer"
)

# Keys in them that can hold a path of the machine they were made on.
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")


def companions(folder: Path) -> dict[str, Path]:
    """Config, tokenizer and remote code of a model folder, by name."""
    return {f.name: f for f in sorted(folder.iterdir())
            if f.is_file() and _COMPANIONS.fullmatch(f.name)}


def copy_companions(files: Mapping[str, Path], out: Path) -> None:
    """Copy companions, without paths of this machine in them."""
    out.mkdir(exist_ok=True)
    for name, file in files.items():
        content = file.read_bytes()
        if name in ("config.json", "tokenizer_config.json"):
            content = _public(content)
        write_atomically(out / name, lambda path, content=content: path.write_bytes(content))


def _public(content: bytes) -> bytes:
    """A JSON mapping with local paths cut to their names."""
    values = json.loads(content)
    for key in _PATHS:
        if isinstance(values.get(key), str) and is_local(values[key]):
            values[key] = name_of(values[key])
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_finished(folder: Path) -> None:
    """Raise `PaveError` unless `folder` holds a config and all of a model's weights."""
    if not (folder / "config.json").is_file():
        raise PaveError(f"{folder} holds no finished merge: it has no config.json; merge again.")
    shards = list(_shards(folder))
    complete = (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS))
    there = [name for name in complete if (folder / name).is_file()]
    if len(there) > 1:
        raise PaveError(
            f"{folder} holds the weights of two merges ({there[0]} and {there[1]}): merge again "
            "into an empty folder."
        )
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        what = f"{missing[0]} is missing" if missing else "it has no weights"
        raise PaveError(f"{folder} holds no finished merge: {what}; merge again.")
    for name in shards:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise PaveError(
                    f"{folder / name} is cut short or damaged ({error}); merge again."
                ) from error


def _shards(folder: Path) -> Iterator[str]:
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                yield from sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise PaveError(f"{index} is damaged; merge again.") from error
        elif (folder / name).exists():
            yield name
