"""The files of a model folder: weights that are complete, config, tokenizer and the like."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit_pave.errors import PaveError
from mergekit_pave.models.names import is_local, name_of
from mergekit_pave.storage.files import write_bytes

_COMPANIONS = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|chat_template|vocab|\w*tokenizer\w*"
    r"|\w*processor(_config)?)\.json|.*\.(py|model|jinja|tiktoken|spm)|(vocab|merges)\.txt"
    # Of single tokenizers, as transformers' `vocab_files_names` lists them.
    r"|(tekken|entity_vocab|target_vocab|vocab-(src|tgt)|normalizer|emoji|byte_maps|word_shape"
    r"|word_pronunciation)\.json|dict\.txt|bpe\.codes|prophetnet\.tokenizer"
)

# Keys in them that can hold a path of the machine they were made on.
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_LFS = b"version https://git-lfs"


def is_companion(name: str) -> bool:
    """Whether a file of that name is a config, a tokenizer's, or remote code."""
    return _COMPANIONS.fullmatch(name) is not None


def refuse_pointers(folder: Path) -> None:
    """Raise `PaveError` where Git has left a pointer in place of a file of weights or tokenizer."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_LFS):
            raise PaveError(
                f"{path} is a Git LFS pointer in place of the file: run `git lfs pull` in its "
                "folder, or download the model with `hf download`.")


def companions(folder: Path) -> dict[str, Path]:
    """Config, tokenizer and remote code of a model folder, by name."""
    return {f.name: f for f in sorted(folder.iterdir())
            if f.is_file() and _COMPANIONS.fullmatch(f.name)}


_MODULES = "modules.json"
_SENTENCES = (_MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")


def sentence_files(folder: Path) -> dict[str, Path]:
    """What sentence-transformers reads beside a model: settings, and the folders of its modules.

    Names are relative to `folder`. There are none where it has no readable list of modules.
    """
    try:
        modules = json.loads((folder / _MODULES).read_text("utf-8"))
        paths = [module["path"] for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found = {name: folder / name for name in _SENTENCES if (folder / name).is_file()}
    for path in paths:
        # Only a plain folder beside the weights: a list from a stranger may name any path.
        if not isinstance(path, str) or not re.fullmatch(r"\w[\w.-]*", path):
            continue
        if (folder / path).is_dir() and not (folder / path).is_symlink():
            files = sorted(f for f in (folder / path).iterdir() if f.is_file())
            found |= {f"{path}/{file.name}": file for file in files}
    return found


def _processor_files(folder: Path) -> dict[str, Path]:
    names = ("preprocessor_config.json", "processor_config.json")
    return {name: folder / name for name in names if (folder / name).is_file()}


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder can have one: what only processes images or sound has not."""
    needs = re.compile(r"\w*tokenizer.*|vocab.*|merges\.txt|.*\.(model|tiktoken|spm)")
    return not _processor_files(folder) or any(needs.fullmatch(f.name) for f in folder.iterdir())


def copy_beside(folders: Iterable[Path], out: Path) -> None:
    """Copy what mergekit leaves behind: processors, and what sentence-transformers reads.

    Each comes from the first folder that has any, and replaces no file of `out`.
    """
    folders = list(folders)
    for of in (sentence_files, _processor_files):
        for name, file in next(filter(None, map(of, folders)), {}).items():
            if not (out / name).exists():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(out / name, file.read_bytes())


def copy_companions(files: Mapping[str, Path], out: Path) -> None:
    """Copy companions, without paths of this machine in them."""
    out.mkdir(exist_ok=True)
    for name, file in files.items():
        content = file.read_bytes()
        if name in ("config.json", "tokenizer_config.json"):
            content = public_json(content)
        write_bytes(out / name, content)


def public_json(content: bytes) -> bytes:
    """A JSON mapping with local paths cut to their names."""
    values = json.loads(content)
    for key in _PATHS:
        if isinstance(values.get(key), str) and is_local(values[key]):
            values[key] = name_of(values[key])
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
