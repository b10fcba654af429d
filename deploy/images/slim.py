"""Takes out of an image what no process runs: installers, headers, others' tests, CUDA on a CPU worker."""

import shutil
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
LEFT_OUT = (
    "pip",
    "pip-*",
    "setuptools",
    "setuptools-*",
    "pkg_resources",
    "_distutils_hack",
    "distutils-precedence.pth",
)
LEFT_OUT += ("torch/include", "torch/share/cmake", "torch/test", "torch/bin/protoc*", "numpy/*/tests", "pandas/tests")
CUDA = ("bitsandbytes/libbitsandbytes_cuda*", "bitsandbytes/libbitsandbytes_rocm*", "bitsandbytes/libbitsandbytes_xpu*")

for form in LEFT_OUT + (CUDA if "--without-cuda" in sys.argv else ()):
    for path in SITE.glob(form):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
for program in (SITE.parents[2] / "bin").glob("pip*"):
    program.unlink()
