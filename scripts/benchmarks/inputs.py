"""What all programs read: the first rows of the data, a prompt, and the checkpoint."""

import json
import shutil
from pathlib import Path

from benchmarks.environments import ProgramError
from benchmarks.jobs import CHECKPOINT, DATA, MICRO_BATCH_SIZE, PROMPT

WEIGHTS = ".safetensors"
PROMPT_CHARACTERS = 400  # more than 64 tokens of any tokenizer, and few enough for any model


def prepare_inputs(work: Path, checkpoint: Path, data: Path, rows: int) -> None:
    """Create the folder that the programs work in."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_rows(work, data / "train.jsonl", rows)
    write_checkpoint(work / CHECKPOINT, checkpoint)


def write_rows(work: Path, source: Path, rows: int) -> None:
    """Write the training rows, a validation row that no program uses, and a long prompt."""
    lines = source.read_text(encoding="utf-8").splitlines()[:rows] if source.is_file() else []
    if not rows == len(lines) > 0 or rows % MICRO_BATCH_SIZE:
        need = f"must be a multiple of {MICRO_BATCH_SIZE} and at most the rows of {source}"
        raise ProgramError(f"--rows ({rows}) {need}")
    folder = work / DATA
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "val.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    text = "".join(json.loads(line)["output"] + " " for line in lines)
    repeated = text * (PROMPT_CHARACTERS // len(text) + 1)
    (work / PROMPT).write_text(repeated[:PROMPT_CHARACTERS], encoding="utf-8")


def write_checkpoint(folder: Path, source: Path) -> None:
    """Link a checkpoint's weights and copy its other files, with a tokenizer class that uses tokenizer.json unchanged.

    Some tokenizer classes of transformers tokenize differently from their tokenizer.json, which litgpt reads.
    """
    if not (source / "config.json").is_file():
        raise ProgramError(f"--checkpoint_dir ({source}) holds no config.json")
    folder.mkdir()
    for path in filter(Path.is_file, source.iterdir()):
        if path.suffix == WEIGHTS:
            (folder / path.name).symlink_to(path.resolve())
        else:  # which litlora copies beside the adapter, and hence must not lie elsewhere
            shutil.copyfile(path, folder / path.name)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and (folder / "tokenizer.json").is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(json.dumps({**values, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
