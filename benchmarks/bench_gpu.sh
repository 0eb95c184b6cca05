#!/usr/bin/env bash
# Everything that needs a GPU, in three runs of under eight minutes each, on a machine that may have nothing but
# PyTorch and Accelerate: `benchmarks/bench_gpu.sh --help` (docs/gpu.md tells how to take along what is missing).
#
#   benchmarks/bench_gpu.sh probe            versions, and what the rest depends on: 20 seconds
#   benchmarks/bench_gpu.sh tests            the tests marked gpu
#   benchmarks/bench_gpu.sh steps            the anchor model's step in every mode
#   benchmarks/bench_gpu.sh large            GPT-2 of 124 M parameters, generation, the anchor run to its gate
#   benchmarks/bench_gpu.sh --dry            all of it on a CPU, in small, with stand-ins
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/bench_gpu.py "$@"
