"""The flags of download."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litlora.args.common import CommandArgs, SecretStr, require_token


@dataclass(frozen=True)
class DownloadArgs(CommandArgs):
    """Download a checkpoint from the Hugging Face Hub."""

    examples: ClassVar = (
        "litlora download meta-llama/Llama-3.2-1B",
        "litlora download mistralai/Mistral-7B-v0.3 --checkpoint_root /data/checkpoints",
    )

    repo_id: str
    """Repository on the Hub."""
    revision: str = "main"
    """Branch, tag or commit of the repository."""
    checkpoint_root: Path = Path("checkpoints")
    """Parent folder: the checkpoint is saved as CHECKPOINT_ROOT/ORG/NAME."""
    access_token: SecretStr | None = None
    """Hub token for gated or private repositories; by default the environment's HF_TOKEN."""
    tokenizer_only: bool = False
    """Download the tokenizer and configuration without the weights."""

    def __post_init__(self) -> None:
        require_token(self.access_token)
