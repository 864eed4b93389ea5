"""Writing a folder as a whole, and the files of a model folder beside its weights."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mergekit_pave.disk import to_disk
from mergekit_pave.errors import PaveError
from mergekit_pave.public import is_local, name_of
from mergekit_pave.store import write_atomically

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


def refuse_used(folder: Path) -> None:
    """Raise `PaveError` unless a model can become that folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PaveError(f"{folder} exists already; choose another folder for the model.")
    if os.path.ismount(os.path.realpath(folder)):  # written beside it, and renamed
        raise PaveError(f"{folder} is a mount point; name a folder in it for the model.")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which gets its name when the block has ended well; where there
    is an empty one, its files then move into that, the config last.

    Raises:
        PaveError: what went wrong with the disk.
    """
    # A link to an empty folder stays one: a folder cannot take the place of the link itself.
    folder = Path(os.path.realpath(folder))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    left_over = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.iterdir():  # by a process that was killed
            if left_over.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            to_disk(file)
        if folder.exists():  # it may be the current one of a shell, which would lose it
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, folder / file.name)
            to_disk(folder)
        else:
            os.replace(temporary, folder)
            to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PaveError(f"Cannot finish {folder}: {reason}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
