"""Compile the kernels with whatever C compiler there is into a shared library beside this file.

Standard library only: setup.py runs this before moedge is installed, and `python moedge/native/build.py` by hand.
Which processor the library meets is not known here: every variant that the compiler can make goes in, and the library
chooses when it is called.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "kernels.so"
COMMON = ("-std=c11", "-O3", "-fPIC", "-D_GNU_SOURCE", "-ffp-contract=off")
# Sources for processors with certain instructions, by machine, and the flags that these need
_X86 = {
    "product_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "product_avx512": ("-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"),
    "order_lanes": ("-mavx2", "-mfma"),
    "levels": ("-mavx2", "-mbmi2", "-mpopcnt"),
    "order_pairs": ("-mavx512bw", "-mavx512vl", "-mavx512bf16"),
}
_ARM: dict[str, tuple[str, ...]] = {"product_neon": ()}
OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}


class BuildError(Exception):
    """There is no C compiler, or it could not compile the kernels."""


def source_hash() -> str:
    """Names this version of the sources; compiled in, so that a stale library is noticed."""
    digest = hashlib.sha256()
    for path in sorted(p for p in HERE.iterdir() if p.suffix in {".c", ".h", ".inc"}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str]:
    """$CC, or the first of cc, gcc and clang. Raises BuildError."""
    if os.environ.get("CC"):
        return os.environ["CC"].split()
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("there is no C compiler (cc, gcc or clang, or one named in $CC)")


def build(folder: Path = HERE, flags: Sequence[str] = ()) -> Path:
    """Compile everything into folder/kernels.so, which is replaced in one step. Raises BuildError."""
    cc = compiler()
    with tempfile.TemporaryDirectory() as scratch:
        objects = compile_objects(cc, Path(scratch), platform.machine(), flags)
        made = Path(scratch) / LIBRARY
        _run([*cc, "-shared", *flags, *map(str, objects), "-lm", "-lpthread", "-o", str(made)])
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{LIBRARY}.{os.getpid()}.tmp"
        shutil.copyfile(made, partial)
        os.replace(partial, folder / LIBRARY)
    return folder / LIBRARY


def compile_objects(cc: Sequence[str], folder: Path, machine: str, flags: Sequence[str] = ()) -> list[Path]:
    """The object files of all sources for `machine` that this compiler can make. Raises BuildError."""
    made, defines = [], [f'-DMOEDGE_SOURCES="{source_hash()}"']
    for name, own in OPTIONAL.get(machine.lower(), {}).items():
        try:
            made.append(_compile(cc, name, folder, (*flags, *own)))
        except BuildError:
            continue  # an older compiler: it does without
        defines.append(f"-DMOEDGE_{name.split('_')[-1].upper()}")
    for name in ("product_scalar", "layer", "linear", "exact", "attention", "quantise", "shorten", "read", "pool"):
        made.append(_compile(cc, name, folder, (*flags, *defines)))
    return made


def _compile(cc: Sequence[str], name: str, folder: Path, flags: Sequence[str]) -> Path:
    target = folder / f"{name}.o"
    _run([*cc, *COMMON, *flags, f"-I{HERE}", "-c", str(HERE / f"{name}.c"), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        first = next(iter(done.stderr.splitlines()), "no message")
        raise BuildError(f"{command[0]} failed: {first}")


def is_current() -> bool:
    """Whether the library beside this file was built from these sources. Looks for the hash in it; loads nothing."""
    library = HERE / LIBRARY
    return library.exists() and source_hash().encode() in library.read_bytes()


if __name__ == "__main__":
    if not is_current():
        try:
            print(f"built {build()}")
        except BuildError as error:
            print(f"the C kernels were not built: {error}. moedge works without them, slower", file=sys.stderr)
