"""Names of models and data: which are local paths, and what of them may be published."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.request import url2pathname

import yaml

BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"encoding": "utf-8-sig"}),
}

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def local_path(source: str) -> Path | None:
    """The path that `source` means, whether or not it exists; `None` for a Hub id or a URL.

    `file:///data/rows%5B1%5D.jsonl` is a path as a URI.
    """
    if source.lower().startswith("file:///"):
        return Path(url2pathname(source[len("file://"):]))
    path = Path(os.path.expanduser(source))
    looks_local = (
        source.startswith((".", "~", "/")) or path.is_absolute() or source.count("/") > 1
        or builder_of(path) is not None or os.path.exists(path))
    return path if looks_local and "://" not in source else None


def builder_of(path: Path) -> tuple[str, dict[str, str]] | None:
    """The builder of `datasets` that reads a file of that name, and its options, if any does."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return BUILDERS.get(path.suffix.lower())


# Paths of Windows, and `file:` URLs.
_FOREIGN = re.compile(r"[A-Za-z]:[\\/]|\\\\|file:")


def is_local(path: str) -> bool:
    """Whether a model, dataset or store of that name is a file or folder, here or elsewhere."""
    return bool(_FOREIGN.match(path)) or local_path(path) is not None


def name_of(path: str) -> str:
    """A Hub id as it is; a URL without what may be secret in it; a local path's last part, `local`
    where that is a user's name."""
    return last_part(path) if is_local(path) else _without_secrets(path)


def _without_secrets(source: str) -> str:
    """A URL, or a chain of them, without user, password, query and fragment."""
    parts = []
    for url in source.split("::"):
        scheme, mark, rest = url.partition("://")
        if mark:
            host, slash, path = rest.partition("/")
            host, path = (re.split("[?#]", part)[0] for part in (host.rpartition("@")[2], path))
            url = f"{scheme}://{host}{slash}{path}"
        parts.append(url)
    return "::".join(parts)


def last_part(path: str) -> str:
    """The name of a file or folder, `local` where that is a user's.

    It has no line break, is UTF-8, and reads as a name: `./123` and `./[draft]` where YAML would
    take the bare word for a number or a list.
    """
    parts = [part for part in re.split(r"[\\/]+", path) if part]
    name = parts[-1] if parts else "local"
    if name in (".", ".."):
        name = Path(path).absolute().resolve().name
    home = len(parts) > 1 and parts[-2] in ("home", "Users")
    if home or name in ("", "~", Path.home().name):
        name = "local"
    name = _UNPRINTABLE.sub("_", name).encode("utf-8", "replace").decode()
    return name if _is_yaml_text(name) else f"./{name}"


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def _is_yaml_text(name: str) -> bool:
    try:
        return yaml.safe_load(name) == name
    except (yaml.YAMLError, ValueError, RecursionError):  # 2001-99-99 is no date
        return False
