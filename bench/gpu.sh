#!/usr/bin/env bash
# Builds gradstep from this checkout, tests it on the GPU, plainly and under compute-sanitizer, and runs the benchmarks: in under nine
# minutes, and without a network.
#
#   bench/gpu.sh [--plan] [FOLDER]
#
# The figures go to FOLDER/<device>.json; FOLDER is bench/results unless it is given. --plan prints the commands and runs none.
# All parts are run, whatever becomes of the others, unless there is nothing to run them on. The exit status is 1 if one has failed.
#
# PYTHON names an interpreter that has torch for CUDA, NumPy, pybind11, scikit-build-core, ninja, pytest and hypothesis; nvcc and
# compute-sanitizer are on the PATH, or in /usr/local/cuda/bin.
set -uo pipefail

total=530 # seconds
python=${PYTHON:-python3}
plan=false
folder=
for argument in "$@"; do
  case $argument in
    --plan) plan=true ;;
    -*)
      echo "usage: bench/gpu.sh [--plan] [FOLDER]" >&2
      exit 2
      ;;
    *) folder=$argument ;;
  esac
done
checkout=$(cd "$(dirname "$0")/.." && pwd) || exit 1
folder=$(realpath -m -- "${folder:-$checkout/bench/results}")
cd "$checkout" || exit 1
PATH=$PATH:/usr/local/cuda/bin

if $plan; then
  work=/tmp/gradstep-gpu
  device='<device>'
else
  work=$(mktemp -d) || exit 1
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$folder" || exit 1
fi
export PYTHONPATH=$work/site # an interpreter of a virtual environment makes none that sees its packages: so a folder, and no environment

summary=()
status=0
missing=

# limit SECONDS: prints them, or what is left of all if that is less.
limit() {
  local left=$((total - SECONDS))
  echo $((left < 1 ? 1 : left < $1 ? left : $1))
}

# part NAME SECONDS COMMAND...: runs a command for so long at most, and keeps what became of it. An interrupt comes before the end, upon
# which the benchmarks write what they have.
part() {
  local name=$1 seconds began=$SECONDS result
  seconds=$(limit "$2")
  shift 2
  if $plan; then
    printf '# %s: up to %s s\n' "$name" "$seconds"
    printf '%q ' "$@"
    printf '\n'
    return 0
  fi
  if [[ $missing ]]; then
    summary+=("$(printf '%-10s not run: %s' "$name" "$missing")")
    return 1
  fi
  printf '\n== %s, up to %s s\n' "$name" "$seconds"
  timeout --signal=INT --kill-after=15 "$seconds" "$@"
  result=$?
  case $result in
    0) result=ok ;;
    124 | 137) result="FAILED: stopped after $seconds s" ;;
    *) result="FAILED: exit status $result" ;;
  esac
  summary+=("$(printf '%-10s %4s s  %s' "$name" $((SECONDS - began)) "$result")")
  echo "-- ${summary[-1]}"
  [[ $result == ok ]] || status=1
  [[ $result == ok ]]
}

# Code for this GPU alone, which takes a part of the time that code for all takes.
part build 160 env GRADSTEP_CUDA=ON CUDAARCHS="${CUDAARCHS:-native}" \
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation --no-deps --upgrade \
  --config-settings=build-dir="$work/build" --target "$work/site" . || missing='there is no build'

part device 30 "$python" -c "
import gradstep, gradstep.cuda, sys, torch
assert gradstep.__file__.startswith(sys.argv[1]), gradstep.__file__
print(torch.cuda.get_device_name())
print(gradstep.cuda.describe())" "$work/site" || missing=${missing:-there is no device}

mapfile -t files < <(grep -l 'pytest\.mark\.cuda' tests/test_*.py)
part tests 100 "$python" -m pytest -q -p no:cacheprovider -m cuda "${files[@]}"

# A rule of each kind, and one of each thing that has a kernel of its own; memory from torch's allocator as it is asked for, so that what
# is beside it is nobody's.
short='adamw or momentum or lamb or full or agc or cautious or q8 or split or norm'
for tool in memcheck racecheck; do
  part "$tool" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no --target-processes all \
    "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_gate.py -k "($short) and not graph"
done

if ! $plan && [[ ! $missing ]]; then
  device=$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
fi
seconds=$(limit 300)
# Nothing new is begun in the last minute: a large case takes up to so long, compilers included.
part benchmark "$seconds" "$python" -m gradstep bench --device cuda --seconds $((seconds > 70 ? seconds - 60 : 10)) \
  --json "$folder/${device:-unknown}.json"

$plan && exit 0
printf '\n== summary, %s s in all\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
[[ $missing ]] && status=1
exit $status
