#!/bin/sh
# AddressSanitizer and UndefinedBehaviorSanitizer over the C++ tests and the Python tests of tree and operations.
# Usage: tools/sanitize.sh [python]. Builds into build/sanitize and leaves the installed package alone.
set -eu
python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/sanitize
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"

cmake -S "$root" -B "$build/cpp" -DSPARSE_RTRL_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1"
cmake --build "$build/cpp" --parallel
ctest --test-dir "$build/cpp" --output-on-failure

# A copy of the package with instrumented libraries beside its sources.
mkdir -p "$build/python"
cp -RL "$root/sparse_rtrl" "$root/csrc" "$root/setup.py" "$root/pyproject.toml" "$build/python/"
rm -f "$build"/python/sparse_rtrl/*.so
# Checked code is slow anyhow; less optimisation makes its build quicker. Reports need the symbols.
sed -i 's/"-O3"/"-O1"/; s/ "-g0",//; s/"-Wl,-s"//' "$build/python/setup.py"
(cd "$build/python" && SPARSE_RTRL_CPP=1 CFLAGS="$flags" LDFLAGS="$flags" "$python" setup.py -q build_ext --inplace)

preload=""
for library in asan ubsan stdc++; do
  preload="$preload $(${CC:-cc} -print-file-name=lib$library.so)"
done
# Python puts the current folder first on its path: from here it imports the instrumented copy.
cd "$build/python"
export LD_PRELOAD="${preload# }" ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1
export OMP_NUM_THREADS=2 PYTHONPATH="$build/python"
"$python" -c "
from sparse_rtrl.ops import dispatch
assert dispatch.__file__.startswith('$build'), dispatch.__file__
assert not dispatch.compiled_problem, dispatch.compiled_problem"
tests=$root/tests
"$python" -m pytest -q -c "$root/pyproject.toml" -p no:cacheprovider --numprocesses auto \
  "$tests/ops/test_compiled.py" "$tests/influence/test_tree.py" "$tests/ops/test_ops.py" "$tests/capture/test_slot_moe_pass.py" "$tests/capture/test_row_tape.py" \
  "$tests/ops/test_diagonal_ops.py" \
  -k "not other_instruction_sets"
