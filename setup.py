"""What pyproject.toml cannot say: the C kernels are compiled at install, and done without where that fails."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildKernels(build_ext):
    """A plain shared library, not a Python module: moedge calls it through ctypes."""

    def get_ext_filename(self, fullname: str) -> str:
        return "/".join([*fullname.split(".")[:-1], "kernels.so"])

    def build_extension(self, ext: Extension) -> None:
        spec = importlib.util.spec_from_file_location("native_build", ROOT / "moedge" / "native" / "build.py")
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)).parent)
        except build.BuildError as error:
            print(f"the C kernels were not built: {error}. moedge works without them, slower", file=sys.stderr)


setup(
    ext_modules=[Extension("moedge.native.kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
