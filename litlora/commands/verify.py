"""verify: the receipt of a training, and a verdict on whether a copy computes the same."""

from litlora.args.verify import VerifyArgs
from litlora.export.verification import verify_copy
from litlora.utils.console import write


def verify(args: VerifyArgs) -> None:
    """Print the largest difference of each prompt from the receipt; LitLoraError for another network."""
    verdict = verify_copy(args.checkpoint_dir, args.base_dir, args.engine)
    write(f"{verdict}\n")
    verdict.refuse_faults(args.checkpoint_dir)
