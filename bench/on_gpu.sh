#!/usr/bin/env bash
# Everything that needs a GPU, unattended, in under 8 minutes: tests, times, memory and race checks.
#
#   bench/on_gpu.sh OUTDIR
#
# Needs this machine's own python with torch, triton, numpy and pytest; installs nothing. PYTHON=... picks another.
# Every step is bounded in time, leaves its log in OUTDIR and a line in OUTDIR/summary.md, and the rest runs whatever
# it says. Exit status: 0 if no step failed. A tool that is not there is a line "not run", not a failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:?usage: bench/on_gpu.sh OUTDIR}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
python=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONPATH=.:reference PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)}  # of its own, so that the first compile is a cold one

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no GPU that torch can see with $python: nothing was run" | tee "$out/summary.md" >&2
    exit 1
fi

failed=0
steps='[]'
{
    echo "# GPU run, $(date -u +%Y-%m-%dT%H:%MZ)"
    echo
    "$python" -c 'import torch, triton; print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")'
    nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed 's/^/driver /'
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
    echo
    echo "| step | result | seconds |"
    echo "|---|---|---:|"
} >"$out/summary.md"

note() {  # name, result, seconds
    echo "| $1 | $2 | $3 |" | tee -a "$out/summary.md"
    steps=$("$python" -c 'import json, sys; s = json.loads(sys.argv[1]); s.append(dict(zip(("step", "result", "seconds"), sys.argv[2:]))); print(json.dumps(s))' "$steps" "$1" "$2" "$3")
    echo "$steps" >"$out/steps.json"
}

step() {  # name, limit in seconds, command...
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $status in
        0) note "$name" passed $((SECONDS - begin)) ;;
        124 | 137) note "$name" "stopped at $limit s" $((SECONDS - begin)); failed=1 ;;
        *) note "$name" "failed ($status)" $((SECONDS - begin)); failed=1 ;;
    esac
    tail -n 3 "$out/$name.log"
}

step compile 130 "$python" -m bench.gpu --compile-only --output "$out"
step tests 150 env EPLB_ON_GPU=1 "$python" -m pytest -q -m gpu tests/kernels/test_gpu.py tests/kernels/test_gpu_previous.py tests/serving/test_serving_gpu.py -p no:cacheprovider --maxfail=20 --durations=5 --junitxml="$out/tests.xml"
step timing 80 "$python" -m bench.gpu --output "$out"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
for tool in memcheck racecheck; do  # racecheck sees shared memory alone
    if [ -n "$sanitizer" ]; then
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 50 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m bench.gpu --once
    else
        note "$tool" "not run: no compute-sanitizer" 0
    fi
done

{
    echo
    echo "Microseconds a plan: replays of a CUDA graph by loads, warm and cold, an empty kernel on the same grid, host time."
    echo
    cat "$out/timing.md" 2>/dev/null || echo "no times"
} >>"$out/summary.md"
exit "$failed"
