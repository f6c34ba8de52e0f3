"""The manifest of a folder: size and hash of every file, by which a corrupt folder is detected."""

import hashlib
import json
from collections.abc import Callable
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
    return _find_difference(folder, lambda path, entry: _entry(path) == entry)


def find_truncation(folder: Path) -> str | None:
    """Compare a folder with its manifest as `find_corruption`, but read no content except for that of JSON files."""
    return _find_difference(folder, _fits_at_a_glance)


def _fits_at_a_glance(path: Path, entry: object) -> bool:
    if path.suffix == ".json":
        return _entry(path) == entry
    return isinstance(entry, dict) and entry.get("size") == path.stat().st_size


def _find_difference(folder: Path, fits: Callable[[Path, object], bool]) -> str | None:
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        for name, entry in read_json(folder / MANIFEST).items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if not fits(path, entry):
                return f"{name} differs from its entry in {MANIFEST}"
    except (LitLoraError, OSError) as error:
        return str(error)
    return None


def _entry(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
