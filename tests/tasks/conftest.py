"""A configuration file, written with changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers.compress import raw


@pytest.fixture
def config(families, tmp_path):
    def write(content=None, **changes) -> Path:
        content = {**raw(families("llama")), **changes} if content is None else content
        file = tmp_path / "merge.yml"
        file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return file

    return write
