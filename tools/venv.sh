# shellcheck shell=bash
# Sourced by the launchers: make .venv if it is missing, install this project into it if the pins
# have changed, and activate it.   source tools/venv.sh [EXTRA]
# Linux wheels of torch on PyPI bring CUDA; PIP_EXTRA_INDEX_URL may name an index of CPU builds.
# NO_VENV=1: everything is installed already, as in the images of the Dockerfile.
[ "${NO_VENV:-0}" != 1 ] || return 0
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_extra=${1:-}
_stamp="$_root/.venv/installed-${_extra:-base}"
if [ ! -d "$_root/.venv" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "ERROR: Python 3.11 or newer is needed; PYTHON=/path/to/python3.11 names one." >&2; exit 1; }
    "${PYTHON:-python3}" -m venv "$_root/.venv"
fi
# shellcheck disable=SC1091 # made above
source "$_root/.venv/bin/activate"
if ! cmp -s "$_root/pyproject.toml" "$_stamp"; then
    echo "installing into .venv (pinned versions of pyproject.toml)"
    python -m pip install --quiet --disable-pip-version-check -e "$_root${_extra:+[$_extra]}" ||
        { echo "ERROR: the installation failed; see the lines above." >&2; exit 1; }
    cp "$_root/pyproject.toml" "$_stamp"
fi
