# Sourced by quickstart.sh and test.sh from the repository's root: makes .venv, installs into it once, activates it.
# PYTHON chooses the interpreter (3.11 or newer). Two switches add what only some tests use; where it cannot be had, they
# are skipped:
#   SEEDLING_BROWSER=1    Chromium by apt-get, for the chat page
#   SEEDLING_LLAMACPP=1   llama-cpp-python, which is built in a few minutes, for GGUF files

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
if [ "${SEEDLING_BROWSER:-0}" = 1 ] && ! command -v chromium >/dev/null; then
    echo "installing chromium ..."
    DEBIAN_FRONTEND=noninteractive timeout 300 \
        sh -c "apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium" >/dev/null ||
        echo "note: no chromium: apt-get failed (does it have root, and a network?); tests of the chat page are skipped" >&2
fi
if [ "${SEEDLING_LLAMACPP:-0}" = 1 ] && ! python -c 'import llama_cpp' 2>/dev/null; then
    echo "building llama-cpp-python (a few minutes) ..."
    pip install --quiet --disable-pip-version-check -e ".[llamacpp]" ||
        echo "note: no llama-cpp-python: pip failed (is there a compiler?); tests of GGUF files are skipped" >&2
fi
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
