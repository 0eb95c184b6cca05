#!/usr/bin/env bash
# From a corpus to a validated model; --help lists the options. PYTHON=... chooses the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

if ! command -v "$python" > /dev/null; then
    echo "train_pipeline.sh: error: there is no $python; run 'make setup', or name one: PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    echo "train_pipeline.sh: error: $("$python" --version 2>&1) is older than 3.11; name another: PYTHON=/path/to/python3.11" >&2
    exit 1
fi
# What is installed beside the interpreter, such as accelerate, without an activated environment.
case $python in */*) export PATH="$(cd "$(dirname "$python")" && pwd):$PATH" ;; esac
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m accel_train.pipeline.command "$@"
