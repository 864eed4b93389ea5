"""What a command imports before it has anything to do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mergekit_pave.cli import _COMMANDS

HEAVY = {"torch", "transformers", "mergekit", "datasets", "accelerate", "numpy", "huggingface_hub"}
ASK = """
import json, sys
from mergekit_pave.cli import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    assert not end.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def loaded(*arguments: str) -> set[str]:
    ended = subprocess.run([sys.executable, "-c", ASK, json.dumps(arguments)],
                           capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and ended.stdout, ended.stderr
    return set(json.loads(ended.stderr.splitlines()[-1]))


def test_help_imports_nothing_that_computes():
    assert not HEAVY & loaded("--help")


@pytest.mark.parametrize("command", sorted(_COMMANDS))
def test_the_help_of_a_command_imports_nothing_that_computes(command):
    assert not HEAVY & loaded(command, "--help")
