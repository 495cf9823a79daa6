"""Installs pip's cuBLAS, without its own dependencies, where the CUDA toolkit has none."""

import glob
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

nvcc = shutil.which("nvcc")
toolkit = Path(nvcc).resolve().parent.parent if nvcc else Path("/usr/local/cuda")
site_packages = Path(sysconfig.get_paths()["purelib"])
places = [toolkit, site_packages / "nvidia"]
if not any(glob.glob(f"{place}/**/libcublasLt.so*", recursive=True) for place in places):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "nvidia-cublas>=13.0,<14"], check=True)
