"""What of a folder is published: its files, without local paths, secrets, and rows of the data."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from litlora.errors import LitLoraError
from litlora.export.ollama import MODELFILE
from litlora.export.receipt import FIXED, RECEIPT, Receipt
from litlora.hub.filenames import CONFIG, GENERATION_CONFIG, INDEX, LICENCES, TOKENIZER_FILES
from litlora.lora.adapter_config import of_base
from litlora.lora.adapter_folder import BASE, GGUF_PATH, LOCAL_PATH, PROMPT_STYLE
from litlora.lora.adapter_folder import CONFIG as ADAPTER_CONFIG
from litlora.utils.files import read_json, refuse_foreign_link

CARD = "README.md"
NAME = "base_model_name_or_path"
LOCAL_PATHS = (LOCAL_PATH, GGUF_PATH)  # what an adapter records beside it
TEXTS = (CARD, ADAPTER_CONFIG, PROMPT_STYLE, CONFIG, GENERATION_CONFIG, INDEX, MODELFILE, RECEIPT, *LICENCES)
WEIGHTS = (".safetensors", ".gguf")
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"}  # whose tokens may look like paths
PLACEHOLDER = "PATH_OF_THIS_FOLDER"  # of the model card
REPO_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abp]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
ROOTS = "home|root|Users|mnt|media|tmp|var|opt|srv|data|scratch|work|workspace|private|gpfs|lustre|nfs|content"
PATH = re.compile(rf"(?<![\w/.:])(?:/(?:{ROOTS})/[\w.-]|~/\w)[^\s\"'`)\]]*|\b[A-Za-z]:\\+Users\\+[^\s\"'`)\]]*")


def published(folder: Path, repo_id: str, base_repo_id: str | None) -> dict[str, bytes | str]:
    """Return what of a folder is uploaded: contents of texts and paths of large files, by name.

    LitLoraError names a file with a secret or a local path in it.
    """
    names = {*TEXTS, *TOKENIZER_FILES}
    paths = [path for path in sorted(folder.iterdir()) if path.name in names or path.suffix in WEIGHTS]
    for path in paths:
        refuse_foreign_link(path)
    contents = {path.name: _content(path, repo_id, base_repo_id) for path in paths}
    if not any(name.endswith(WEIGHTS) for name in contents):
        raise LitLoraError(f"{folder} has no weights to upload: name the folder of an adapter or of a model")
    found = {name: content for name, content in contents.items() if content}
    for name, content in found.items():
        if isinstance(content, bytes):
            refuse_secrets(folder / name, content.decode(errors="replace"))
    return found


def kind_of(names: Collection[str]) -> str:
    """Return which copy of a trained network some files are, by the names that model cards have for it."""
    if not any(name.endswith(".gguf") for name in names):
        return "merged"
    return "gguf-lora" if "adapter.gguf" in names else "gguf"


def _content(path: Path, repo_id: str, base_repo_id: str | None) -> bytes | str:
    """Return the content of a file as it is published, empty for nothing, or its path if it is large."""
    if path.suffix in WEIGHTS or path.name == "tokenizer.model":
        return str(path)
    if path.name == ADAPTER_CONFIG:
        return _json(_without_paths(path, read_json(path), base_repo_id))
    if path.name == RECEIPT:
        return _public_receipt(path.parent)
    if path.suffix == ".json" and path.name not in VOCABULARIES:
        settings = read_json(path)
        return _json({key: value for key, value in settings.items() if key not in ("_name_or_path", "name_or_path")})
    content = path.read_bytes()
    return content.replace(PLACEHOLDER.encode(), repo_id.encode()) if path.name == CARD else content


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(path: Path, config: dict[str, Any], base_repo_id: str | None) -> dict[str, Any]:
    """Return adapter_config.json without the path of its base, which must be a repository of the Hub."""
    if any(of_base(config, key) is not None for key in LOCAL_PATHS):
        recorded = {key: value for key, value in config[BASE].items() if key not in LOCAL_PATHS}
        config = config | {BASE: recorded or None}
    name = base_repo_id or str(config.get(NAME))
    if base_repo_id:
        config = config | {NAME: name, "revision": None}
    if not REPO_ID.fullmatch(name) or Path(name).exists():
        hint = "name its repository on the Hub with --base_repo_id ORG/NAME"
        raise LitLoraError(f"{path} names its base by a local path ({name}), where nobody else finds it: {hint}")
    return config


def _public_receipt(folder: Path) -> bytes:
    """Return the receipt without the rows of the validation split, or nothing if it has no others."""
    receipt = Receipt.read(folder)
    fixed = [probe for probe in receipt.prompts if probe.row == FIXED.to_json()]
    return replace(receipt, prompts=fixed).content() if fixed else b""


def refuse_secrets(path: Path, text: str) -> None:
    """Refuse a text with a secret, or with a path of this machine."""
    if SECRET.search(text):
        raise LitLoraError(f"{path} holds what looks like an access token or a private key: remove it before uploading")
    found = None if path.name in VOCABULARIES else PATH.search(text)
    if found or (path.name not in VOCABULARIES and str(Path.home()) in text and Path.home() != Path("/")):
        shown = found[0] if found else str(Path.home())
        raise LitLoraError(f"{path} holds a path of this machine ({shown}): remove it before uploading")
