"""evaluate: a model and rows in, metrics with intervals out."""

import json

from litlora.args.inference import EvaluateArgs
from litlora.errors import LitLoraError
from litlora.evaluation.results import Results, confusion_table, results, samples, table
from litlora.evaluation.rows import Comparison
from litlora.evaluation.scoring import score
from litlora.utils.console import log, output
from litlora.utils.files import write_atomically


def evaluate(args: EvaluateArgs, comparison: Comparison | None = None) -> None:
    """Measure a model on rows of data, and compare it with a baseline; `comparison` is given if it has been read."""
    comparison = comparison or Comparison.read(args)
    task, baseline, rows = comparison.task, comparison.baseline, len(comparison.rows)
    log(f"{rows:,} rows, --prompt_style {task.subject.settings.name!r}")
    scores = score(task, rows)
    measured = results(args, comparison, scores, None if baseline is None else score(baseline, rows))

    for line in samples(args, comparison, scores):
        output(line)
    for line in table(measured):
        output(line)
    if measured.confusion is not None:
        for line in ["", *confusion_table(args.choices, measured.confusion)]:
            output(line)
    save(args, measured)
    if failures := measured.failures(args.thresholds):
        raise LitLoraError(f"--fail_below: {'; '.join(failures)}")


def save(args: EvaluateArgs, measured: Results) -> None:
    """Write everything to --out_file, if there is one."""
    if args.out_file is not None:
        content = json.dumps(measured.to_json(), ensure_ascii=False, indent=2) + "\n"
        write_atomically({args.out_file: content.encode(errors="backslashreplace")})
        log(f"results in {args.out_file}")
