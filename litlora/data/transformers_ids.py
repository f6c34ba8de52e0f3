"""Rows that the installed transformers, and a server built on it, tokenizes otherwise than the checkpoint's files."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import tokenizers

from litlora.data.checks.findings import Finding, Severity
from litlora.data.dataset import open_split, read_rows
from litlora.data.prompts.rendered import Rendered
from litlora.data.readers.parsers import jsonl_lines, jsonl_rows
from litlora.data.readers.row_formats import ANY
from litlora.data.split_encoder import TEXTS, SplitEncoder
from litlora.utils.console import log

EXAMINED = 20_000  # rows of each split, which take a few seconds
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from litlora.data.transformers_ids import print_backend; "
"""Start of a program in which transformers works without torch, which would take seconds and 250 MB."""


def find_other_ids(checkpoint_dir: Path, encoder: SplitEncoder, paths: Sequence[Path]) -> Iterator[Finding]:
    """Yield a finding of the rows whose ids differ in the installed transformers, if it is installed."""
    other = _installed_backend(checkpoint_dir)
    if other is None:
        return
    found = [_differing(path, encoder, other) for path in paths]
    if locations := [location for places, _ in found for location in places]:
        part = f" among the first {EXAMINED:,} of a split" if any(is_part for _, is_part in found) else ""
        consequence = "a server that tokenizes with it feeds the model other tokens than it was trained on"
        what = f"with other ids in the installed transformers{part}"
        yield Finding("transformers_ids", Severity.WARNING, len(locations), locations[0], what, consequence)


def _installed_backend(checkpoint_dir: Path) -> tokenizers.Tokenizer | None:
    """Return what the installed transformers makes of a checkpoint's tokenizer; None without one."""
    if importlib.util.find_spec("transformers") is None:
        return None
    if "transformers" in sys.modules:
        return _backend(checkpoint_dir)
    program = [sys.executable, "-c", f"{WITHOUT_TORCH}print_backend(sys.argv[1])", str(checkpoint_dir)]
    same_path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, env=same_path, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        log(f"the installed transformers cannot read this tokenizer, and its ids are not compared: {reason}")
    return tokenizers.Tokenizer.from_str(done.stdout) if done.stdout else None


def print_backend(checkpoint_dir: str) -> None:
    """Write transformers' tokenizer as tokenizer.json has it, or nothing if it has none such."""
    backend = _backend(Path(checkpoint_dir))
    sys.stdout.write("" if backend is None else backend.to_str())


def _backend(checkpoint_dir: Path) -> tokenizers.Tokenizer | None:
    auto = importlib.import_module("transformers").AutoTokenizer
    other = auto.from_pretrained(str(checkpoint_dir), local_files_only=True, trust_remote_code=False)
    backend: tokenizers.Tokenizer | None = other.backend_tokenizer if other.is_fast else None
    return backend


def _differing(path: Path, encoder: SplitEncoder, other: tokenizers.Tokenizer) -> tuple[list[str], bool]:
    """Return the location of each row whose ids differ, and whether there are more rows than were examined."""
    style = encoder.tokenizer.prompt_style(encoder.prompt_style)
    places: list[str] = []
    with open_split(path) as file:
        numbered = jsonl_rows(jsonl_lines(file))
        examined = islice(numbered, EXAMINED)
        while chunk := list(islice(examined, TEXTS)):
            rows, _ = read_rows(chunk, ANY)
            rendered = [(line, each) for line, row in rows for each in style.render(row.example) if not each.literal]
            differs = _differ([each for _, each in rendered], encoder, other)
            lines = dict.fromkeys(line for (line, _), differ in zip(rendered, differs, strict=True) if differ)
            places += [f"{path} line {line}" for line in lines]
        return places, next(numbered, None) is not None


def _differ(rendered: Sequence[Rendered], encoder: SplitEncoder, other: tokenizers.Tokenizer) -> list[bool]:
    ours = encoder.tokenizer.encode_rendered(rendered, add_special_tokens=False)
    theirs = other.encode_batch([each.text for each in rendered], add_special_tokens=False)
    pairs = zip(ours.by_text(ours.ids), theirs, strict=True)
    return [ids.tolist() != encoding.ids for ids, encoding in pairs]
