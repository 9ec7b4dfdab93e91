"""The C kernels by themselves: under sanitizers, on AArch64 by emulation, built and loaded as users do."""

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from moedge.native import build, library

CHECK = Path(__file__).parent / "check.c"
QUICK = ("-O1", "-DUNROLL=", "-DINLINE=static")  # to compile: inlined and unrolled they take a minute
SANITIZERS = (*QUICK, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compile_check(cc: list[str], machine: str, flags: tuple[str, ...], folder: Path) -> Path:
    """The program of check.c with the kernels for `machine`; skips where this compiler cannot make it."""
    program = folder / "check"
    if subprocess.run(
        [*cc, *flags, "-xc", "-", "-o", program], input=b"int main(void) {return 0;}", capture_output=True
    ).returncode:
        pytest.skip(f"{cc[0]} cannot compile with {' '.join(flags) or 'no flags'}")
    objects = build.compile_objects(cc, folder, machine, flags)
    sources = [str(CHECK), *map(str, objects)]
    command = [*cc, *build.COMMON, *flags, f"-I{build.HERE}", *sources, "-lm", "-lpthread", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cc() -> list[str]:
    try:
        return build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def built(cc: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build(tmp_path_factory.mktemp("built"), QUICK)


def test_kernels_agree_with_float64_under_address_and_undefined_behaviour_sanitizers(
    cc: list[str], tmp_path: Path
) -> None:
    program = compile_check(cc, os.uname().machine, SANITIZERS, tmp_path)
    assert "rounds" in run([str(program), os.environ.get("MOEDGE_CHECK_SECONDS", "2"), "3"])


def test_neon_agrees_with_float64_by_emulation(tmp_path: Path) -> None:
    cross, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if cross is None or emulator is None:
        pytest.skip("aarch64-linux-gnu-gcc or qemu-aarch64 is not installed")
    program = compile_check([cross], "aarch64", (*QUICK, "-static"), tmp_path)
    assert "neon: " in run([emulator, str(program), "2", "3"])


def test_a_library_is_built_loaded_and_used(built: Path) -> None:
    found, reason = library._load(built)
    assert found is not None, reason
    assert found.read_sum(0, 0, 1) == 0


def test_a_stale_library_is_not_used(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "source_hash", lambda: "newer")
    found, reason = library._load(built)
    assert found is None
    assert "other sources" in reason


def test_a_missing_or_damaged_library_is_said_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "HERE", tmp_path)
    with caplog.at_level(logging.WARNING, "moedge"):
        assert library.load.__wrapped__() is None
        (tmp_path / library.LIBRARY).write_bytes(b"not a library")
        assert library.load.__wrapped__() is None
    assert "not built" in caplog.text
    assert "cannot be loaded" in caplog.text


def test_a_variant_that_gives_wrong_results_here_is_passed_over(
    built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = library._small_layer

    def broken(variant: library.Library) -> list[float]:
        return [x + (variant.variant != "scalar") for x in real(variant)]

    if len(library.variants(built)) < 2:
        pytest.skip("this processor runs the portable variant only")
    monkeypatch.setattr(library, "_small_layer", broken)
    found, _ = library._load(built)
    assert found is not None
    assert found.variant == "scalar"
    assert "wrong results" in caplog.text


def test_a_compiler_that_is_missing_or_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler cannot be run"):
        build.build(tmp_path)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(build.BuildError, match="false failed"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C compiler"):
        build.build(tmp_path)
