# Sourced by quickstart.sh and test.sh from the repository's root: makes .venv, installs into it once, activates it.
# PYTHON chooses the interpreter (3.11 or newer).

PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $PYTHON is not there or older than 3.11; name a newer one with PYTHON=python3.12 bash $0" >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
source .venv/bin/activate
# installed once for each state of pyproject.toml
if ! cmp -s pyproject.toml .venv/installed-pyproject.toml; then
    echo "installing into .venv (a few minutes the first time) ..."
    pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"  # first: deepspeed's build looks for it
    pip install --quiet --disable-pip-version-check -e ".[dev]"
    cp pyproject.toml .venv/installed-pyproject.toml
fi
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
