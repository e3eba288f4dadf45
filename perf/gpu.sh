#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under eight minutes: perf/gpu.sh [--dry-run]
#
# The kernels' tests (marker gpu), then perf.kernels. Needs python3 with torch, triton, pytest and rich, no
# network; further packages (flashinfer) may lie on PYTHONPATH. Results go to $OUT, or else perf/results/:
#   kernel-tests.xml  kernel-tests.log   which tests ran and how they ended
#   kernels.json      kernels.log        times, bounds, what was wrong
#   gpu.json                             exit codes and seconds of both; also the last line of stdout
# --dry-run tries the same steps without a GPU: tiny shapes in Triton's interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-perf/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

tests=(-m gpu) timings=(--seconds 210)
case "${1:-}" in
  "") ;;
  --dry-run) tests=(-m "not gpu") timings=(--dry-run --cases "1 ") ;;
  *) echo "usage: perf/gpu.sh [--dry-run]" >&2; exit 2 ;;
esac
if "$python" -c 'import flashinfer' 2>/dev/null; then timings+=(--flashinfer); fi

began=$SECONDS
# What pytest would warn of on another version of torch or of a plugin is no failure here.
timeout 210 "$python" -m pytest -q -o filterwarnings=default -p no:cacheprovider "${tests[@]}" \
  --junitxml "$out/kernel-tests.xml" tests/kernels/test_ops.py tests/kernels/test_products.py > "$out/kernel-tests.log" 2>&1
tested=$? tests_s=$((SECONDS - began))
tail -n 15 "$out/kernel-tests.log" >&2

began=$SECONDS
timeout 260 "$python" -m perf.kernels "${timings[@]}" --json "$out/kernels.json" > "$out/kernels.log" 2>&1
timed=$? timings_s=$((SECONDS - began))
grep -v '^{' "$out/kernels.log" >&2

printf '{"benchmark": "gpu", "dry_run": %s, "tests_rc": %d, "tests_s": %d, "kernels_rc": %d, "kernels_s": %d}\n' \
  "$([[ ${1:-} ]] && echo true || echo false)" $tested $tests_s $timed $timings_s | tee "$out/gpu.json"
exit $((tested || timed))
