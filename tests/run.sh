#!/usr/bin/env bash
# Install into .venv (once) and run lint, types and tests. Arguments go to pytest.
# TEST_WORKERS files are tested at a time; 0: one after the other in one process, as for a debugger.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/venv.sh test
ruff check .
ruff format --check .
mypy
exec python -m pytest -q -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
