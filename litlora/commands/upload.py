"""upload: a verified adapter, merged checkpoint or GGUF file in, a repository of the Hub out."""

from litlora.args.common import revealed
from litlora.args.hub import UploadArgs
from litlora.errors import LitLoraError
from litlora.export.model_card import copy_card
from litlora.export.publication import CARD, kind_of, published
from litlora.export.receipt import RECEIPT
from litlora.export.verdict import log_verdict
from litlora.export.verification import verify_copy
from litlora.hub.client import Repo
from litlora.hub.upload import upload as commit
from litlora.utils.console import log, output


def upload(args: UploadArgs) -> None:
    """Upload a folder once it is verified, and print the page of the repository."""
    folder = args.checkpoint_dir
    repo = Repo(args.repo_id, "model", args.revision, revealed(args.access_token))
    files = published(folder, args.repo_id, args.base_repo_id)
    if CARD not in files:
        files[CARD] = copy_card(kind_of(files), args.base_repo_id).encode()
    if args.verify:
        if not (folder / RECEIPT).is_file():
            hint = "pass --verify false to upload it as it is"
            raise LitLoraError(f"{folder} has no {RECEIPT}, by which it would be verified: {hint}")
        log_verdict(verify_copy(folder, args.base_dir), folder)
    log(f"uploading {', '.join(sorted(files))}")
    output(commit(repo, files, private=args.private, message="Upload with litlora"))
