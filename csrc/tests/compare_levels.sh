#!/usr/bin/env bash
# Build the core without Python and compare every CPU level with the base level.
#
#   csrc/tests/compare_levels.sh            on this machine, with $CC
#   csrc/tests/compare_levels.sh aarch64    cross-compiled for 64-bit Arm, under an emulator
#
# Debian has what the second needs: gcc-aarch64-linux-gnu and qemu-user.
set -euo pipefail

csrc=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/ptqkit-levels.XXXXXX")
trap 'rm -rf "$work"' EXIT

case ${1:-native} in
    native) cc=${CC:-cc} emulator=() ;;
    aarch64) cc=aarch64-linux-gnu-gcc emulator=(qemu-aarch64 -L /usr/aarch64-linux-gnu) ;;
    *) echo "usage: $0 [native|aarch64]" >&2; exit 2 ;;
esac

# The flags of setup.py.
flags="-std=gnu11 -O3 -ffp-contract=off -fno-trapping-math -fno-math-errno
    -Wall -Wextra -Wconversion -Wno-sign-conversion -Werror"
openmp=-fopenmp
echo 'int main(void) { return 0; }' > "$work/probe.c"
$cc -fopenmp "$work/probe.c" -o "$work/probe" 2> "$work/probe.log" || openmp=
# One compiler for each processor; the longest files first.
for source in "$csrc"/kernels/*.c "$csrc/tests/compare_levels.c" "$csrc"/core/*.c; do
    printf '%s\0-o\0%s\0' "$source" "$work/$(basename "$source" .c).o"
done | xargs -0 -n 3 -P "$(nproc)" $cc $flags $openmp -pthread -c
$cc $openmp -pthread "$work"/*.o -lm -o "$work/compare_levels"
"${emulator[@]}" "$work/compare_levels"
