#!/usr/bin/env bash
# Install into .venv (once) and run lint and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/venv.sh test
ruff check .
ruff format --check .
exec python -m pytest -q "$@"
