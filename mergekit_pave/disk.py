"""What it takes for a file to outlive a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def to_disk(path: Path) -> None:
    """Wait until a file or a folder's names survive a power cut.

    Else a disk may keep the rename and lose the content: a manifest of files that are empty.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders.
    try:
        os.fsync(descriptor)
    except OSError as error:
        # What network and FUSE file systems say that cannot promise it.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
