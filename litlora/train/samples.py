"""The sample completions of a run: printed at each validation, recorded for the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from litlora.data.examples import Example
from litlora.distributed.process_group import Ranks
from litlora.evaluation.samples import Completer
from litlora.train.run_dir import RunFolder
from litlora.utils.console import log
from litlora.utils.signals import StopRequest


@dataclass(frozen=True)
class SampleRows:
    """Rows of the validation split that a run completes: the first at each validation, all at the start and the end."""

    completer: Completer
    examples: Sequence[tuple[int, Example]]
    """Rows, counted from 0, and their examples; none without samples."""
    folder: RunFolder
    is_stopped: Callable[[], bool]

    def show(self, step: int) -> None:
        """Complete and print the first row."""
        for row, example in self.examples[:1]:
            completion = self.completer.complete(row, example)
            log(str(completion))
            self.folder.log_sample(step, completion.to_json())

    def record(self, step: int) -> None:
        """Complete what is not recorded yet of a step, unless the run is told to stop."""
        recorded = self.completer.engine.ranks.broadcast_result(lambda: self.folder.sampled_rows(step))
        for row, example in self.examples:
            if row not in recorded and not self.is_stopped():
                self.folder.log_sample(step, self.completer.complete(row, example).to_json())


def is_told_to_stop(ranks: Ranks, stop: StopRequest) -> bool:
    """Tell whether any rank is told to stop; all ranks ask together."""
    return bool(ranks.all_reduce_max(stop.exit_code()))
