"""The files of a model folder: weights that are complete, config, tokenizer and the like."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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

# What a merge writes beside its weights. Beside a merge others keep files, too: those that only
# look like a tokenizer's (`lid.model`, `train.py`) are theirs.
_WRITTEN = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|chat_template|vocab"
    r"|tokenizer(_config)?|(video_)?(pre)?processor_config)\.json|chat_template\.jinja"
    r"|(vocab|merges)\.txt|(source|target)\.spm"
    r"|(tokenizer|spiece|sentencepiece(\.bpe)?|spm(_char)?|tiktoken)\.model"
    r"|(tekken|entity_vocab|target_vocab|vocab-(src|tgt))\.json|bpe\.codes|prophetnet\.tokenizer"
)

# Keys in settings that can hold a path of the machine they were made on.
_PATH = re.compile(r"_?name_or_path|\w+_file")
_LFS = b"version https://git-lfs"


def is_companion(name: str) -> bool:
    """Whether a file of that name is a config, a tokenizer's, or remote code."""
    return _COMPANIONS.fullmatch(name) is not None


def is_pointer(path: Path) -> bool:
    """Whether Git has left a pointer in place of a large file."""
    return path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_LFS)


def refuse_pointers(folder: Path) -> None:
    """Raise `PaveError` where Git has left a pointer in place of a file of weights or tokenizer."""
    for path in sorted(folder.iterdir()):
        if is_pointer(path):
            raise PaveError(
                f"{path} is a Git LFS pointer in place of the file: run `git lfs pull` in its "
                "folder, or download the model with `hf download`.")


def companions(folder: Path) -> dict[str, Path]:
    """Config, tokenizer and remote code of a model folder, by name."""
    return {f.name: f for f in sorted(folder.iterdir())
            if f.is_file() and _COMPANIONS.fullmatch(f.name)}


def written(folder: Path) -> dict[str, Path]:
    """Those companions that a merge may have written, by name."""
    return {name: file for name, file in companions(folder).items() if _WRITTEN.fullmatch(name)}


def own_code(folder: Path) -> dict[str, Path]:
    """The Python files that a model's settings name, what these import from beside them, and the
    vocabularies that they mention, by name."""
    found: dict[str, Path] = {}
    maps = (_mapping(folder / name).get("auto_map") for name in
            ("config.json", "tokenizer_config.json", "processor_config.json"))
    modules = re.findall(r"(?<![\w.-])(\w+)\.\w+", json.dumps([m for m in maps if m]))
    while modules:
        name = f"{modules.pop()}.py"
        if name not in found and (folder / name).is_file():
            found[name] = folder / name
            text = found[name].read_text("utf-8", "replace")
            modules += re.findall(r"^\s*from\s+\.(\w+)\s+import", text, re.MULTILINE)
    code = "".join(file.read_text("utf-8", "replace") for file in found.values())
    return found | {n: f for n, f in companions(folder).items()
                    if n.endswith((".model", ".tiktoken", ".spm")) and n in code}


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON mapping; an empty one where the file is none."""
    try:
        values = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


_MODULES = "modules.json"
_OF_MODULE = re.compile(r"\w*config\.json|model\.safetensors|pytorch_model\.bin|tokenizer\.json"
                        r"|(vocab|merges)\.(txt|json)|special_tokens_map\.json")
_SENTENCES = (_MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")


def sentence_files(folder: Path) -> dict[str, Path]:
    """What sentence-transformers reads beside a model: settings, and the folders of its modules.

    Names are relative to `folder`. There are none where it has no readable list of modules.
    """
    try:
        modules = json.loads((folder / _MODULES).read_text("utf-8"))
        paths = [module["path"] for module in modules]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    found = {name: folder / name for name in _SENTENCES if (folder / name).is_file()}
    for path in paths:
        # Only a plain folder beside the weights: a list from a stranger may name any path.
        if not isinstance(path, str) or not re.fullmatch(r"\w[\w.-]*", path):
            continue
        if (folder / path).is_dir() and not (folder / path).is_symlink():
            files = sorted(f for f in (folder / path).iterdir()
                           if f.is_file() and _OF_MODULE.fullmatch(f.name))
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
        write_bytes(out / name, public(name, file.read_bytes()))


def make_public(folder: Path) -> None:
    """Take the paths of this machine out of the settings beside a model."""
    for name, file in companions(folder).items():
        content = file.read_bytes()
        if (new := public(name, content)) != content:
            write_bytes(file, new)


def public(name: str, content: bytes) -> bytes:
    """A companion with the local paths of its settings cut to their names."""
    if not name.endswith("config.json"):
        return content
    try:
        values = json.loads(content)
        new = _public(values)
        same = new == values
    except (ValueError, RecursionError):  # no settings
        return content
    text = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
    return content if same else text.encode("utf-8", "backslashreplace")  # as JSON writes it, too


def _public(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _public(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    local = isinstance(value, str) and _PATH.fullmatch(key) and is_local(value)
    return name_of(value) if local else value


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
