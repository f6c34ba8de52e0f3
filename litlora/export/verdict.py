"""Whether what an engine computes is what a receipt has, and the words for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from litlora.errors import LitLoraError
from litlora.export.receipt import Receipt, largest_difference, score
from litlora.export.scoring import Engine
from litlora.utils.console import log

MARGIN = 3.0  # on the largest change that random roundings make


@dataclass(frozen=True)
class Verdict:
    """The largest difference in log-probability of each prompt, and what is wrong."""

    differences: list[float]
    tolerance: float
    storage: str
    """The type of the weights, for which the tolerance is."""
    faults: list[str]
    notes: Sequence[str] = ()

    def refuse_faults(self, folder: Path) -> None:
        """Raise a LitLoraError if anything is wrong."""
        if self.faults:
            hint = "copy or export it again from the run that trained it"
            raise LitLoraError(f"{folder} is not the network that was trained: {'; '.join(self.faults)}; {hint}")

    def __str__(self) -> str:
        rows = [f"prompt {n}: largest difference {value:.2e}" for n, value in enumerate(self.differences, start=1)]
        verdict = "different" if self.faults else "the same"
        return "\n".join([*rows, *self.notes, f"tolerance {self.tolerance:.2e} for {self.storage} weights: {verdict}"])


def compare(
    receipt: Receipt,
    engine: Engine,
    tolerance: float,
    share: float,
    storage: str,
    faults: Sequence[str],
    notes: Sequence[str] = (),
    rounding: str | None = None,
) -> Verdict:
    """Compare what an engine computes with a receipt, where weights are rounded by a share of bfloat16's rounding.

    That share is beside the `rounding` of which the receipt has the log-probabilities.
    """
    scored = score(engine, receipt.prompts)
    expected = [probe.expected(rounding) for probe in receipt.prompts]
    differences = [largest_difference(*pair) for pair in zip(scored, expected, strict=True)]
    limit = tolerance + MARGIN * share * receipt.sensitivity
    # Not "above": a comparison with NaN is false.
    if not all(difference <= limit for difference in differences):
        faults = [*faults, f"log-probabilities differ by {max(differences):.2e}, above the tolerance of {limit:.2e}"]
    return Verdict(differences, limit, storage, list(faults), notes)


def log_verdict(verdict: Verdict, folder: Path) -> None:
    """Print whether what was written computes what its receipt has; LitLoraError where it does not."""
    log(str(verdict))
    verdict.refuse_faults(folder)
