#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 8 minutes: the tests marked gpu, the step in every
# mode, generation, and the anchor run to its gate. Results go to $OUT (default: results/gpu).
#
#   benchmarks/bench_gpu.sh            PYTHON=/path/to/python3 benchmarks/bench_gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-results/gpu}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "bench_gpu.sh: no CUDA device here")'
"$python" -m pytest -q -m gpu tests 2>&1 | tee "$out/tests.log"

echo "== steps: the anchor model in every mode, GPT-2 of 124 M parameters"
"$python" benchmarks/bench.py gpu --json >"$out/gpu.json"
"$python" benchmarks/bench_gpu.py table "$out/gpu.json"

echo "== generation"
"$python" benchmarks/bench.py generate --json | tee "$out/generate.json"

echo "== walks_anchor.yaml to its gate"
timeout 200 "$python" -m accelerate.commands.launch --config_file accelerate_config.yaml scripts/train.py \
    --config examples/walks_anchor.yaml --output_dir "$out/results" --training.log_interval 500 2>&1 |
    tee "$out/anchor.log" || echo "the anchor run ended with ${PIPESTATUS[0]}"
"$python" benchmarks/bench_gpu.py gate "$out/results" | tee "$out/gpu_gate.json"

cat <<END
On the machine whose docs/benchmarks.md is to have them:
    benchmarks/bench_report.py --take gpu $out/gpu.json; benchmarks/bench_report.py --take gpu_gate $out/gpu_gate.json
END
