#!/usr/bin/env bash
# Runs the tests on a build with sanitizers: tools/sanitize.sh asan|tsan [arguments of pytest]
#
#   asan   AddressSanitizer and UndefinedBehaviorSanitizer
#   tsan   ThreadSanitizer
#
# The build lies in build/asan or build/tsan; what is installed stays as it is. Ends with a status other than 0 if a test fails or
# a sanitizer reports anything. CXX chooses the compiler, PYTHON the interpreter, which needs pytest, hypothesis and pybind11.
set -euo pipefail
cd "$(dirname "$0")/.."

preset=${1:-}
case $preset in
  asan) libraries="libasan.so libubsan.so" clang_library=asan ;;
  tsan) libraries="libtsan.so" clang_library=tsan ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
shift
python=${PYTHON:-python3}
compiler=${CXX:-c++}

site=$("$python" tools/build.py "$preset")

# The runtime has to be in the process before Python is: a module can't bring it along.
if "$compiler" --version | grep -q clang; then
  libraries="libclang_rt.$clang_library-$(uname -m).so"
fi
preload=
for library in $libraries; do preload+="$("$compiler" -print-file-name="$library") "; done

# What the tests compare with (torch, its OpenMP, SciPy's BLAS) is not instrumented, so threads of its own look like races: those
# tests are left out. So are those of memory in use, which counts what a sanitizer keeps back, and the one that crashes on purpose.
left_out="torch or optax or grow or needs_no_memory or guard_pages_guard"
tests=()
for name in values layouts refused numpy memory threads stages stages_refused norms norm_rules skip averages statistics noise \
  formats precision compressed formats_refused; do
  tests+=("tests/test_$name.py")
done
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then tests=(); fi
done

reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
# Python keeps memory to its end on purpose, and its own allocator would hide an overflow.
export PYTHONMALLOC=malloc
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1:log_path=$reports/asan"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$reports/ubsan"
export TSAN_OPTIONS="die_after_fork=0:second_deadlock_stack=1:suppressions=$PWD/tools/tsan.supp:log_path=$reports/tsan"
run=(env "LD_PRELOAD=$preload" "PYTHONPATH=$site" "$python" -m pytest -q -p no:cacheprovider -k "not ($left_out)" "${tests[@]}" "$@")
# ThreadSanitizer's map of memory does not allow for addresses as random as newer kernels make them.
if [ "$preset" = tsan ] && command -v setarch >/dev/null; then run=(setarch -R "${run[@]}"); fi

status=0
"${run[@]}" || status=$?
for report in "$reports"/*; do
  [ -e "$report" ] || continue
  cat "$report"
  status=1
done
[ "$status" = 0 ] && echo "$preset: nothing found"
exit "$status"
