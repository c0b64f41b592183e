"""Builds the C extension; everything else about the package stands in pyproject.toml.

Each kernel body is compiled once per instruction set and all of them are linked into one module,
which picks the best one at import.

Environment: CC (gcc or clang), POCKETLLM_WERROR=1 makes warnings errors,
POCKETLLM_SANITIZE=address,undefined builds with those sanitizers.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CSRC = Path("csrc")
ONCE = [
    "cpu.c",
    "module.c",
    "module_args.c",
    "module_search.c",
    "module_infer.c",
    "module_layer.c",
    "module_train.c",
    "module_feedback.c",
    "module_rounded.c",
    "module_trellis.c",
]
PER_ISA = [
    "isa_table.c",
    "bfloat16.c",
    "coder.c",
    "coder_mlp.c",
    "feedback.c",
    "infer.c",
    "infer_int.c",
    "layer.c",
    "metric.c",
    "mlp.c",
    "pack.c",
    "rounded.c",
    "search.c",
    "train.c",
    "tree_build.c",
    "tree_bytes.c",
    "tree_cells.c",
    "tree_search.c",
    "trellis.c",
]
ISA_FLAGS = {
    "x86_64": {
        "scalar": [],
        "avx2": ["-DPLLM_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            "-DPLLM_ISA_AVX512",
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi"),
            *("-mavx512vnni", "-mbmi2", "-mavx2", "-mfma", "-mf16c"),
        ],
    },
    "aarch64": {"scalar": [], "neon": ["-DPLLM_ISA_NEON"]},
}
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wno-unknown-pragmas"]


def isa_flags() -> dict[str, list[str]]:
    """Compiler flags of every instruction set that this kind of machine may have."""
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return ISA_FLAGS.get(machine, {"scalar": []})


class BuildKernels(build_ext):
    """Compiles the extension's sources, the kernel bodies once per instruction set."""

    def build_extension(self, ext: Extension) -> None:
        sanitize = os.environ.get("POCKETLLM_SANITIZE", "")
        sanitizer = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
        optimise = ["-g", "-O1", "-fno-omit-frame-pointer", "-DPLLM_NO_UNROLL"]
        optimise = optimise if sanitize else ["-g0", "-O3"]
        # Python may bring -fwrapv, which makes loops over ints slower; no kernel relies on it.
        flags = ["-std=c11", "-fno-wrapv", *optimise, *sanitizer, "-ffp-contract=off", "-fopenmp"]
        flags += ["-fvisibility=hidden", "-UNDEBUG" if sanitize else "-DNDEBUG", *WARNINGS]
        if os.environ.get("POCKETLLM_WERROR", "0") not in ("", "0"):
            flags.append("-Werror")
        self.check_toolchain([*optimise, "-fopenmp"])

        headers = [*self.include_dirs, *ext.include_dirs]
        python_flags = [flag for path in headers for flag in ("-isystem", path)]
        jobs = [(CSRC / name, "once", [*flags, *python_flags]) for name in ONCE]
        for isa, extra in isa_flags().items():
            jobs += [(CSRC / name, isa, [*flags, *extra]) for name in PER_ISA]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self.compile_one(*job), jobs))

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-fopenmp", *sanitizer], libraries=["m"]
        )

    def compile_one(self, source: Path, variant: str, flags: list[str]) -> str:
        """Compiles one source unless its object is newer than everything it depends on."""
        command = [*self.compiler.compiler_so, *flags]
        key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
        target = Path(self.build_temp, f"{variant}-{key}", source.stem + ".o")
        inputs = [source, Path(__file__), *CSRC.glob("*.h")]
        if target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*command, "-c", str(source), "-o", str(target)])
        return str(target)

    def check_toolchain(self, flags: list[str]) -> None:
        """Compiles two lines first, to say in one sentence what is missing."""
        compiler = self.compiler.compiler_so[0]
        with tempfile.TemporaryDirectory() as folder:
            for text, problem in (
                (
                    "int main(void) { return 0; }\n",
                    f"no working C compiler: `{compiler}` failed; install gcc or clang, "
                    "or name one in CC.",
                ),
                (
                    "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n",
                    f"no OpenMP: `{compiler} -fopenmp` failed; install libgomp (with gcc) or "
                    "libomp-dev (with clang).",
                ),
            ):
                source = Path(folder, "check.c")
                source.write_text(text)
                openmp = flags if "omp.h" in text else []
                command = [compiler, *openmp, str(source), "-o", str(Path(folder, "check"))]
                try:
                    subprocess.run(command, check=True, capture_output=True)
                except (OSError, subprocess.CalledProcessError) as error:
                    raise CompileError(f"pocketllm cannot be built: {problem}") from error


if platform.system() == "Windows":
    raise PlatformError("pocketllm cannot be built on Windows: its kernels need gcc or clang.")

setup(
    ext_modules=[
        Extension(
            "pocketllm._kernels",
            sources=[str(CSRC / name) for name in ONCE + PER_ISA],
            depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
            include_dirs=[numpy.get_include()],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
