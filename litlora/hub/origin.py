"""Where a checkpoint folder came from: the Hub repository and the commit, recorded by `download`."""

import json
from pathlib import Path
from typing import NamedTuple

from litlora.errors import LitLoraError
from litlora.utils.files import read_json, write_atomically

ORIGIN = ".litlora.json"  # hidden, so that other tools ignore it


class Origin(NamedTuple):
    """A Hub repository at one commit."""

    repo_id: str
    revision: str
    license: str | None = None
    """The license that the repository's model card names, as an identifier of the Hub, such as apache-2.0."""


def origin(checkpoint_dir: Path) -> Origin | None:
    """Return where a checkpoint was downloaded from, or None where that is not recorded."""
    path = checkpoint_dir / ORIGIN
    if not path.is_file():
        return None
    content = read_json(path)
    repo_id, revision, name = (content.get(key) for key in Origin._fields)
    if not isinstance(repo_id, str) or not isinstance(revision, str) or not isinstance(name, str | None):
        raise LitLoraError(f"{path} must have the texts repo_id and revision; remove it, or download again")
    return Origin(repo_id, revision, name)


def write_origin(checkpoint_dir: Path, source: Origin) -> None:
    """Record where a checkpoint was downloaded from."""
    content = json.dumps(source._asdict(), indent=2) + "\n"
    write_atomically({checkpoint_dir / ORIGIN: content.encode()})
