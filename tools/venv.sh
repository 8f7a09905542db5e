# shellcheck shell=bash
# Sourced by the launchers: make .venv if it is missing, install this project into it if what it
# needs has changed, and activate it.   source tools/venv.sh EXTRAS     hf,plot or the like; "": none
#
# PYTHON names the Python to make it with; without it, one is looked for. Linux wheels of torch on
# PyPI bring CUDA; PIP_EXTRA_INDEX_URL may name an index of CPU builds.
# NO_VENV=1: everything is installed already, as in the images of the Dockerfile.
[ "${NO_VENV:-0}" != 1 ] || return 0
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
_venv=$_root/.venv
_extras=${1:-}
_stamp=$_venv/installed-${_extras:-base}

# Whether a Python runs, is new enough and has the modules to make a venv. Being on the PATH is not
# enough: pyenv has shims for versions that are not chosen, Debian's Python may lack ensurepip.
_is_usable() {
    "$1" -c "import sys, ${2:-venv, ensurepip}; sys.exit(sys.version_info < (3, 12))" &>/dev/null
}

# Pythons that may be there, one a line.
_candidates() {
    local folder
    printf '%s\n' python3.13 python3.12 python3 python
    folder=${PYENV_ROOT:-$(pyenv root || echo ~/.pyenv)}
    printf '%s\n' "$folder"/versions/3.13*/bin/python "$folder"/versions/3.12*/bin/python
    uv python find '>=3.12' || true
    for folder in "${CONDA_PREFIX:-/opt/conda}" ~/miniconda3 ~/miniforge3 ~/anaconda3; do
        printf '%s\n' "$folder"/bin/python "$folder"/envs/*/bin/python
    done
}

_find_python() {
    local candidate
    while read -r candidate; do
        if _is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done < <(_candidates 2>/dev/null)
    return 1
}

# What would make another installation necessary. One that was interrupted has left no stamp.
_needs() { cat "$_root/pyproject.toml" "$_root/constraints.txt"; }

# A .venv of an older Python, that was moved, or whose making was interrupted, is not whole.
_is_whole() { _is_usable "$_venv/bin/python" pip && grep -qsF "$_venv" "$_venv/bin/activate"; }
_is_ready() { _is_whole && _needs | cmp -s - "$_stamp"; }

_fail() {
    echo "ERROR: $1" >&2
    exit 1
}

_make() {
    local python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=$(_find_python) || _fail "no Python 3.12 or newer found: install one (apt install \
python3.12-venv, pyenv install 3.13, uv python install 3.13) or name it, PYTHON=/path/to/python."
    fi
    _is_usable "$python" || _fail "PYTHON=$python: not Python 3.12 or newer with its module venv."
    [ ! -e "$_venv" ] || echo "making .venv anew: it is not whole, or its Python is too old"
    "$python" -m venv --clear "$_venv" || _fail "$python made no .venv; see the lines above."
    # The pip that comes with a Python is as old as that; if there is no newer one to be had, it does.
    "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip || true
}

if ! _is_ready; then
    # Launchers that start at the same time take turns.
    ! command -v flock >/dev/null || { exec 9>"$_root/.venv.lock" && flock 9; }
    _is_whole || _make
    if ! _is_ready; then
        echo "installing into .venv (versions of constraints.txt)"
        "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -c "$_root/constraints.txt" -e "$_root${_extras:+[$_extras]}" ||
            _fail "the installation failed; see the lines above."
        _needs >"$_stamp"
    fi
    exec 9>&-
fi
# shellcheck disable=SC1091 # made above
source "$_venv/bin/activate"
