"""download: a repository of the Hub in, a checkpoint folder out."""

import sys

from litlora.args import DownloadArgs
from litlora.hub.download import Repo, fetch_checkpoint


def download(args: DownloadArgs) -> None:
    """Fetch the files that litlora reads into CHECKPOINT_ROOT/ORG/NAME, and print that folder."""
    token = args.access_token.get_secret_value() if args.access_token else None
    repo = Repo(args.repo_id, "model", args.revision, token)
    fetched = fetch_checkpoint(repo, args.checkpoint_root, args.tokenizer_only)
    sys.stderr.write(f"{repo} at commit {fetched.commit}: {len(fetched.names)} files fetched\n")
    sys.stdout.write(f"{fetched.folder}\n")
