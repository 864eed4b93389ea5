"""Local data whose name `datasets` would take for a pattern or for a chain of archives.

`datasets` hands every path to a glob: `rows[1].jsonl` reads `rows1.jsonl`, `part*.jsonl` reads
all that begin with `part`, `a::b` is `a` inside the archive `b`, and no glob finds a name with a
line break. Names cannot be escaped, so such data are read through links with plain names.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from mergekit_pave.errors import PaveError

_PATTERN = re.compile(r"[*?\[\]]")
# Inside a folder as well: what a glob has found is opened by its name.
_ANYWHERE = re.compile(r"::|[\r\n]")


def literal(path: Path, links: Path) -> Path:
    """The path under which `datasets` reads exactly the file or folder at `path`.

    Args:
        path: an existing file or folder.
        links: folder for the links, where they stay: rows of images name their files by them.

    Raises:
        PaveError: links cannot be made there.
    """
    # As `datasets` does, which sees the names of all folders above.
    whole = str(path.resolve())
    files = _files(path) if path.is_dir() else {}
    if not _PATTERN.search(whole) and not any(map(_ANYWHERE.search, (whole, *files))):
        return path
    wanted = files or {_plain(path.name): path.resolve()}
    target = links / _key(wanted)
    if not target.exists():
        try:
            _link(wanted, target)
        except OSError as error:
            raise PaveError(
                f"{path} has a name that is read as a pattern, and a link with another name cannot "
                f"be made in {links} ({error.strerror}); rename the data, without * ? [ ] :: and "
                "line breaks."
            ) from error
    return target if path.is_dir() else target / _plain(path.name)


def literal_url(url: str) -> str:
    """A web address without the letters of a pattern, which `datasets` would try to match."""
    if not re.match(r"https?://", url, re.IGNORECASE):
        return url
    return re.sub(r"[*\[\]]", lambda letter: f"%{ord(letter[0]):02X}", url)


def _files(folder: Path) -> dict[str, Path]:
    """Every file below the folder, by its relative name."""
    root = folder.resolve()
    return {
        os.path.relpath(os.path.join(parent, name), root): Path(parent, name)
        for parent, _, names in os.walk(root, followlinks=True)
        for name in names
    }


def _plain(name: str) -> str:
    return _PATTERN.sub("_", _ANYWHERE.sub("_", name))


def _key(files: dict[str, Path]) -> str:
    """Other files, or the same ones with other content, are other links: `datasets` keeps what
    it has read by name and time."""
    about = hashlib.sha256()
    for name, file in sorted(files.items()):
        seen = file.stat()
        about.update(f"{name}|{file}|{seen.st_ino}|{seen.st_ctime_ns}|{seen.st_size}\n".encode())
    return about.hexdigest()[:16]


def _link(files: dict[str, Path], target: Path) -> None:
    """Make the folder `target` with a link for every file; it appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix="."))
    try:
        for name, file in files.items():
            link = made / _ANYWHERE.sub("_", name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
        made.chmod(0o755)
        os.replace(made, target)
    except OSError:
        # Another process may have been first.
        if not target.exists():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
