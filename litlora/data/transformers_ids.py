"""Rows that the installed transformers, and a server built on it, tokenizes otherwise than the checkpoint's files."""

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from litlora.data.checks import Finding, Severity
from litlora.data.dataset import open_split, read_rows
from litlora.data.readers import jsonl_lines, jsonl_rows
from litlora.data.rendered import Rendered
from litlora.data.row_formats import ANY
from litlora.data.split_encoder import TEXTS, SplitEncoder


def find_other_ids(checkpoint_dir: Path, encoder: SplitEncoder, paths: Sequence[Path]) -> Iterator[Finding]:
    """Yield a finding of the rows whose ids differ in the installed transformers, if it is installed."""
    if importlib.util.find_spec("transformers") is None:
        return
    auto = importlib.import_module("transformers").AutoTokenizer
    other = auto.from_pretrained(str(checkpoint_dir), local_files_only=True, trust_remote_code=False)
    if not other.is_fast:
        return
    locations = [place for path in paths for place in _differing(path, encoder, other.backend_tokenizer)]
    if locations:
        consequence = "a server that tokenizes with it feeds the model other tokens than it was trained on"
        what = "with other ids in the installed transformers"
        yield Finding("transformers_ids", Severity.WARNING, len(locations), locations[0], what, consequence)


def _differing(path: Path, encoder: SplitEncoder, other: Any) -> Iterator[str]:
    """Yield the location of each row of a split whose ids differ."""
    style = encoder.tokenizer.prompt_style(encoder.prompt_style)
    with open_split(path) as file:
        numbered = jsonl_rows(jsonl_lines(file))
        while chunk := list(islice(numbered, TEXTS)):
            rows, _ = read_rows(chunk, ANY)
            rendered = [(line, each) for line, row in rows for each in style.render(row.example) if not each.literal]
            differs = _differ([each for _, each in rendered], encoder, other)
            lines = dict.fromkeys(line for (line, _), differ in zip(rendered, differs, strict=True) if differ)
            yield from (f"{path} line {line}" for line in lines)


def _differ(rendered: Sequence[Rendered], encoder: SplitEncoder, other: Any) -> list[bool]:
    ours = encoder.tokenizer.encode_rendered(rendered, add_special_tokens=False)
    theirs = other.encode_batch([each.text for each in rendered], add_special_tokens=False)
    pairs = zip(ours.by_text(ours.ids), theirs, strict=True)
    return [ids.tolist() != encoding.ids for ids, encoding in pairs]
