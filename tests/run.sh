#!/usr/bin/env bash
# Installs the package with what its tests need into the Python environment that is active, and
# runs them; options go to pytest. Slow and GPU tests have markers and are not part of it.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pip install --quiet torch==2.13.0 -e ".[test]"
exec pytest -n 2 --dist loadfile "$@"
