#!/usr/bin/env bash
# All kernel measurements on a GPU in at most 9 minutes: correctness, ceilings, tuning, benchmark, plots.
#
#   scripts/gpu_day.sh FOLDER               writes JSON, logs and PNGs to FOLDER
#   scripts/gpu_day.sh FOLDER --self-test   the same steps on the CPU, on tiny shapes: nothing is measured
#
# Every step has its own time limit, and no step starts with less than 10 seconds left. A step that fails does not stop the
# next ones; failed steps are named at the end, and the exit status is 1. PYTHON: the interpreter (default: python or python3,
# whichever has torch).
set -uo pipefail
begun=$SECONDS
cd "$(dirname "$0")/.." || exit 2

if [[ -z ${1:-} || $1 == -* ]]; then
    echo "usage: scripts/gpu_day.sh FOLDER [--self-test]" >&2
    exit 2
fi
case $1 in /*) folder=$1 ;; *) folder=$OLDPWD/$1 ;; esac
self=()
total=540
if [[ $# -eq 2 && $2 == --self-test ]]; then
    self=(--self-test)
elif [[ $# -gt 1 ]]; then
    echo "usage: scripts/gpu_day.sh FOLDER [--self-test]; got ${*:2}" >&2
    exit 2
fi
python=${PYTHON:-}
for found in python python3; do # the first that has torch
    [[ -z $python ]] && "$found" -c "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)" 2>/dev/null && python=$found
done
python=${python:-python3}
jobs=$(nproc 2>/dev/null || echo 4)
((jobs > 12)) && jobs=12
((${#self[@]})) && jobs=1
if ((!${#self[@]})) && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu_day.sh: torch of $python finds no GPU; --self-test runs the steps on the CPU" >&2
    exit 2
fi
mkdir -p "$folder/logs" "$folder/tuned" || exit 2 # without a table from the sweep, the benchmark uses the rules
failed=()

# step NAME LIMIT COMMAND...: run a command within LIMIT seconds and the total, with output to the terminal and a log.
step() {
    local name=$1 limit=$2 left=$((total - (SECONDS - begun))) status at=$SECONDS
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 10)); then
        echo "== $name: not started, the $total s are used up"
        failed+=("$name (no time)")
        return
    fi
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$folder/logs/$name.log"
    status=${PIPESTATUS[0]}
    ((status == 124 || status == 137)) && echo "== $name: stopped after $limit s"
    ((status == 0)) || failed+=("$name ($status)")
    echo "== $name: status $status, $((SECONDS - at)) s"
}

# The tools' own time boxes are shorter than the limits of the steps, so that they write their results.
bench=("$python" scripts/bench_kernels.py --output "$folder")
step check 120 "${bench[@]}" --check-only --jobs "$jobs" --seconds 105 ${self[@]+"${self[@]}"}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if ((${#self[@]})); then
    echo "== sanitizer: skipped in a self-test, which runs no GPU code"
elif [[ -z $sanitizer ]]; then
    echo "== sanitizer: NOT RUN, compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin" | tee "$folder/logs/sanitizer.log"
else
    # Without torch's cache every tensor is a separate allocation, so that an access one byte beyond it shows.
    step sanitizer 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 9 \
        "$python" scripts/bench_kernels.py --check-only --small --seconds 45 --output "$folder/sanitizer"
fi

step ceilings 20 "${bench[@]}" --ceilings-only ${self[@]+"${self[@]}"}
step sweep 130 "$python" scripts/tune_kernels.py --output "$folder/tuned" --jobs "$jobs" --seconds 110 ${self[@]+"${self[@]}"}
step bench 115 "${bench[@]}" --tables "$folder/tuned" --seconds 95 ${self[@]+"${self[@]}"}
step bench-bfloat16 60 "${bench[@]}" --tables "$folder/tuned" --dtype bfloat16 --seconds 45 ${self[@]+"${self[@]}"}
if "$python" -c "import matplotlib" 2>/dev/null; then
    step plots 25 "$python" scripts/plot_kernels.py "$folder"
else
    echo "== plots: NOT DRAWN, matplotlib is not installed (pip install 'llmq[plots]'); scripts/plot_kernels.py draws them later"
fi

echo "== $((SECONDS - begun)) s in total; results are in $folder"
if ((${#failed[@]})); then
    echo "== FAILED: ${failed[*]}"
    exit 1
fi
echo "== every step succeeded"
