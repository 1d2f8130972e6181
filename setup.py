"""Sources and flags of the C core; all metadata is in pyproject.toml."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def openmp_flags():
    """Probe -fopenmp; PTQKIT_OPENMP=1 makes it mandatory, 0 leaves it out."""
    wanted = os.environ.get("PTQKIT_OPENMP", "")
    if wanted == "0":
        return []
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.c")
        probe.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
        command = [*os.environ.get("CC", "cc").split(), "-fopenmp", str(probe), "-o"]
        found = subprocess.run([*command, str(Path(folder, "probe"))], capture_output=True)
    if found.returncode == 0:
        return ["-fopenmp"]
    if wanted == "1":
        raise SystemExit("PTQKIT_OPENMP=1, but the compiler cannot build with -fopenmp")
    print("ptqkit: the compiler has no OpenMP, the core will run on one thread", file=sys.stderr)
    return []


def extension():
    """The one extension module."""
    openmp = openmp_flags()
    extra = os.environ.get("PTQKIT_CFLAGS", "").split()
    # Results must not move with CPU level or inlining: no contraction, no fast math. Nothing reads
    # the floating-point traps or errno, which would keep loops from being vectorized.
    flags = "-std=gnu11 -O3 -ffp-contract=off -fno-trapping-math -fno-math-errno"
    flags += " -pthread -fvisibility=hidden -Wall -Wextra -Wconversion"
    return Extension(
        "ptqkit._core",
        sources=sorted(
            str(p)
            for folder in ("core", "kernels", "bind")
            for p in Path("csrc", folder).glob("*.c")
        ),
        depends=sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inc")),
        include_dirs=[numpy.get_include()],
        extra_compile_args=[*flags.split(), "-Wno-sign-conversion", *openmp, *extra],
        extra_link_args=["-pthread", *openmp, *[f for f in extra if f.startswith("-fsanitize")]],
    )


class ParallelBuild(build_ext):
    """Compiles as many files at a time as there are processors; setuptools takes one by one."""

    def build_extensions(self):
        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0,
                        extra_preargs=None, extra_postargs=None, depends=None):  # fmt: skip
            macros, objects, extra, options, build = self.compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            arguments = self.compiler._get_cc_args(options, debug, extra_preargs)
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                jobs = [
                    pool.submit(self.compiler._compile, o, *build[o], arguments, extra, options)
                    for o in objects
                    if o in build
                ]
                for job in jobs:
                    job.result()
            return objects

        if self.compiler.compiler_type == "unix":
            self.compiler.compile = compile_all
        super().build_extensions()


setup(ext_modules=[extension()], cmdclass={"build_ext": ParallelBuild})
