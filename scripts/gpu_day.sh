#!/usr/bin/env bash
# The first minutes on a GPU, end to end, in at most 9: correct, then the ceilings, the sweep, the benchmark, the plots.
#
#   scripts/gpu_day.sh FOLDER               JSON, logs and PNGs go to FOLDER
#   scripts/gpu_day.sh FOLDER --self-test   the same steps on the CPU, on tiny shapes: nothing is measured
#
# Every step has a time limit of its own, and none is begun with less than 10 seconds left of all. A step that fails does not
# stop the next ones; at the end those that failed are named, and the status is 1. PYTHON: the interpreter (default: python or
# python3, whichever has torch).
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
    echo "gpu_day.sh takes a folder and --self-test; got ${*:2}" >&2
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
    echo "gpu_day.sh: torch finds no GPU here (asked: $python); --self-test tries the steps without one" >&2
    exit 2
fi
mkdir -p "$folder/logs" "$folder/tuned" || exit 2 # the benchmark takes the rules where the sweep wrote no table
failed=()

# step NAME LIMIT COMMAND...: run within LIMIT seconds and what is left of all, the output to the terminal and a log.
step() {
    local name=$1 limit=$2 left=$((total - (SECONDS - begun))) status at=$SECONDS
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 10)); then
        echo "== $name: not begun, the $total s are over"
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

# The limits of the tools' own time boxes lie below those of the steps: what was reached is written, not lost.
bench=("$python" scripts/bench_kernels.py --output "$folder")
step check 120 "${bench[@]}" --check-only --jobs "$jobs" --seconds 105 ${self[@]+"${self[@]}"}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if ((${#self[@]})); then
    echo "== sanitizer: left out of a self-test, there is no GPU code in it"
elif [[ -z $sanitizer ]]; then
    echo "== sanitizer: compute-sanitizer is not here (not on PATH, not in /usr/local/cuda/bin): NOT RUN" | tee "$folder/logs/sanitizer.log"
else
    # Without torch's cache every tensor is an allocation of its own, so that one byte beyond it shows.
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
    echo "== plots: matplotlib is not installed (pip install 'llmq[plots]'): NOT DRAWN; scripts/plot_kernels.py draws them later"
fi

echo "== $((SECONDS - begun)) s in all; what was made lies in $folder"
if ((${#failed[@]})); then
    echo "== FAILED: ${failed[*]}"
    exit 1
fi
echo "== every step succeeded"
