"""download: a repository of the Hub in, a checkpoint folder out."""

from litlora.args.common import revealed
from litlora.args.hub import DownloadArgs
from litlora.hub.client import Repo
from litlora.hub.download import fetch_checkpoint
from litlora.utils.console import log, output


def download(args: DownloadArgs) -> None:
    """Fetch the files that litlora reads into CHECKPOINT_ROOT/ORG/NAME, and print that folder."""
    repo = Repo(args.repo_id, "model", args.revision, revealed(args.access_token))
    fetched = fetch_checkpoint(repo, args.checkpoint_root, args.tokenizer_only)
    log(f"{repo} at commit {fetched.commit}: {len(fetched.names)} files fetched")
    output(str(fetched.folder))
