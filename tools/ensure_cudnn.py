"""Puts the headers of cuDNN and of its C++ frontend into DIR/include, from their wheels.

    python tools/ensure_cudnn.py DIR          then: cmake -DCudnnFrontend_ROOT=DIR

Only the headers are kept: a build needs no more. Without a network it says so and the build goes on
with the engine's own attention kernel.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Wheel, and where it holds its headers. The cuDNN one is 0.5 GB, nearly all of it the library.
WHEELS = {
    "nvidia-cudnn-frontend>=1.32,<2": "include/",
    "nvidia-cudnn-cu13>=9.7,<10": "nvidia/cudnn/include/",
}


def fetch_headers(requirement: str, prefix: str, include: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
        subprocess.run([*pip, "--only-binary=:all:", "-d", folder, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not name.startswith(prefix) or name.endswith("/"):
                    continue
                target = include / name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def main() -> None:
    include = Path(sys.argv[1]) / "include"
    if (include / "cudnn.h").exists() and (include / "cudnn_frontend.h").exists():
        return
    try:
        for requirement, prefix in WHEELS.items():
            fetch_headers(requirement, prefix, include)
    except subprocess.CalledProcessError as error:
        print(f"ensure_cudnn: {error}; the build goes on without cuDNN", file=sys.stderr)


main()
