"""The flags of the prepare commands and of check_data."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from litlora.args.common import CommandArgs, SecretStr, require, require_seed, require_token

NEXT_PAIR = re.compile(r",(?=\s*\w+\s*=|\s*$)")
"""The comma before another KEY=COLUMN, or at the end."""


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class PrepareArgs(CommandArgs):
    """The settings that all prepare commands share."""

    destination_path: Path
    """Output folder for train.jsonl, val.jsonl and dataset.json."""
    source: str | list[str]
    """File, http(s) URL, or data set ORG/NAME of the Hub; several with weights, such as a.jsonl=0.7, are mixed."""
    val_split_fraction: float
    """Share of the rows in the validation split; unused with val_source."""
    val_source: str | list[str] | None = None
    """Source of the validation split, whose rows are not those of --source."""
    deduplicate: bool = False
    """Leave out rows that repeat another, and keep those that differ in case and punctuation only on one side."""
    seed: int = 42
    """Random seed of the split and of the mixture."""
    encoding: str | None = None
    """Encoding of the files, such as cp1252, by default UTF-8; UTF-16 and UTF-32 are recognized."""
    split: str = "train"
    """Split of a data set on the Hub."""
    subset: str | None = None
    """Subset of a data set on the Hub, by default the one that its card names as default."""
    access_token: SecretStr | None = None
    """Hub token for gated or private data sets; by default the environment's HF_TOKEN."""
    quiet: bool = False
    """Print warnings and errors only."""

    @property
    def sources(self) -> list[str]:
        """The sources as a list."""
        return _as_list(self.source)

    @property
    def val_sources(self) -> list[str]:
        """The sources of the validation split as a list."""
        return _as_list(self.val_source or [])

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_token(self.access_token)
        require(bool(self.sources), "--source", self.source, "a file, an http(s) address, or ORG/NAME of the Hub")
        fraction = self.val_split_fraction
        require(0 < fraction < 1, "--val_split_fraction", fraction, "between 0 and 1, both exclusive")


@dataclass(frozen=True)
class PrepareAlpacaArgs(PrepareArgs):
    """Prepare the cleaned Alpaca archive, or another file with its keys, for fine-tuning."""

    examples: ClassVar = (
        "litlora prepare_alpaca",
        "litlora prepare_alpaca --source rows.json --destination_path data/rows",
    )

    destination_path: Path = Path("data/alpaca")
    source: str | list[str] = (
        "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
    )
    val_split_fraction: float = 0.03865  # 2,000 of the archive's 51,759 rows, as in Lit-GPT


@dataclass(frozen=True)
class PrepareLimaArgs(PrepareArgs):
    """Prepare LIMA, or another file in its format, for fine-tuning."""

    examples: ClassVar = (
        "litlora prepare_lima",
        "litlora prepare_lima --include_multiturn_conversations true",
    )

    destination_path: Path = Path("data/lima")
    source: str | list[str] = "GAIR/lima"
    val_split_fraction: float = 0.1
    include_multiturn_conversations: bool = False
    """Include all turns of a conversation instead of the first turn."""


@dataclass(frozen=True)
class PrepareJsonArgs(PrepareArgs):
    """Prepare a JSON, JSONL, CSV, TSV or Parquet file of your own for fine-tuning."""

    examples: ClassVar = (
        "litlora prepare_json --source rows.csv --destination_path data/rows",
        "litlora prepare_json --source rows.csv --destination_path data/rows --columns instruction=Q,output=A",
    )

    destination_path: Path
    source: str | list[str]
    val_split_fraction: float = 0.1
    columns: str | None = None
    """Which columns are which key: instruction=Frage,output=Antwort; also for input, system, text, messages, ..."""

    def column_names(self) -> dict[str, str]:
        """Return the columns by the keys that they stand for."""
        # A comma may also be part of a column's name
        pairs = [pair.partition("=") for pair in re.split(NEXT_PAIR, self.columns or "") if pair.strip()]
        is_right = all(name.strip() and column.strip() for name, _, column in pairs)
        require(is_right, "--columns", self.columns, "pairs such as instruction=Frage,output=Antwort")
        return {name.strip(): column.strip() for name, _, column in pairs}


@dataclass(frozen=True)
class CheckDataArgs(CommandArgs):
    """Check prepared data for what would teach the wrong thing, and show what is learned."""

    examples: ClassVar = (
        "litlora check_data checkpoints/ORG/NAME --data_dir data/alpaca",
        "litlora check_data checkpoints/ORG/NAME --data_dir data/alpaca --show 3 --strict true",
    )

    checkpoint_dir: Path
    """Folder of the base model: its tokenizer files and config.json, without weights if need be."""
    data_dir: Path
    """Folder with train.jsonl and val.jsonl, written by a prepare command."""
    prompt_style: str = "auto"
    """As in finetune_lora."""
    prompt_style_variables: dict[str, Any] | None = None
    """As in finetune_lora."""
    mask_prompt: bool = True
    """As in finetune_lora."""
    max_seq_length: int | None = None
    """Maximum number of tokens of an example, by default the checkpoint's limit."""
    show: int = 0
    """Print this many rows of the training split as they are learned, supervised tokens marked."""
    tokens: bool = False
    """Print the rows of --show with a token in each cell."""
    strict: bool = False
    """Treat warnings as errors."""

    def __post_init__(self) -> None:
        require(self.show >= 0, "--show", self.show, "0 or more")
        length = self.max_seq_length
        require(length is None or length >= 1, "--max_seq_length", length, "at least 1, or null")
