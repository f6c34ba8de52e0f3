"""The flags of download and upload."""

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
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        require_token(self.access_token)


@dataclass(frozen=True)
class UploadArgs(CommandArgs):
    """Upload an adapter, a merged checkpoint or a GGUF file to the Hugging Face Hub, once it is verified."""

    examples: ClassVar = (
        "litlora upload out/alpaca/final --repo_id me/alpaca-lora --private true",
        "litlora upload out/gguf --repo_id me/alpaca-gguf",
    )

    checkpoint_dir: Path
    """Folder of the adapter, of the merged checkpoint or of the GGUF file."""
    repo_id: str
    """Repository on the Hub, which is created if it is not there."""
    revision: str = "main"
    """Branch of the repository, which is created if it is not there."""
    private: bool = False
    """Create a private repository; refuse one that is there and public."""
    base_dir: Path | None = None
    """Folder of the adapter's base, by default the one in its adapter_config.json."""
    base_repo_id: str | None = None
    """Repository of the adapter's base on the Hub, by default the one that it was downloaded from."""
    verify: bool = True
    """Upload only what computes the same as the receipt of its training has."""
    access_token: SecretStr | None = None
    """Hub token that may write to the repository; by default the environment's HF_TOKEN."""

    def __post_init__(self) -> None:
        require_token(self.access_token)
