"""The manifest of a folder: size and hash of every file, by which a corrupt folder is detected."""

import hashlib
import json
from pathlib import Path

from litlora.errors import LitLoraError
from litlora.utils.files import read_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Record size and hash of the files that a folder holds now."""
    entries = {path.name: _entry(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def find_corruption(folder: Path) -> str | None:
    """Compare a folder with its manifest; return the first difference, or None if it is intact."""
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        for name, entry in read_json(folder / MANIFEST).items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if _entry(path) != entry:
                return f"{name} differs from its entry in {MANIFEST}"
    except (LitLoraError, OSError) as error:
        return str(error)
    return None


def _entry(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
