"""evaluate: a model and rows in, metrics with intervals out."""

import json
from collections.abc import Mapping
from typing import Any

from litlora.args.inference import EvaluateArgs
from litlora.errors import LitLoraError
from litlora.evaluation.results import about, confusion_table, results, samples, table, task_table
from litlora.evaluation.rows import Comparison
from litlora.evaluation.scoring import score
from litlora.evaluation.tasks import Benchmark, task_metrics
from litlora.utils.console import log, output
from litlora.utils.files import check_replaceable, write_atomically


def evaluate(args: EvaluateArgs, read: Comparison | Benchmark | None = None) -> None:
    """Measure a model on tasks or on rows of data; `read` is given if these have been read."""
    if args.out_file is not None:
        check_replaceable(args.out_file, "--out_file", b'{\n  "metrics"')
    read = read or (Benchmark.read(args) if args.tasks else Comparison.read(args))
    if isinstance(read, Benchmark):
        evaluate_tasks(args, read)
    else:
        evaluate_rows(args, read)


def evaluate_tasks(args: EvaluateArgs, benchmark: Benchmark) -> None:
    """Have lm-eval compute tasks with a model."""
    from litlora.evaluation.lm_eval_model import run_tasks  # an extra

    metrics = task_metrics(run_tasks(benchmark)["results"])
    for line in task_table(metrics):
        output(line)
    save(args, {"metrics": metrics, **about(benchmark.subject)})


def evaluate_rows(args: EvaluateArgs, comparison: Comparison) -> None:
    """Measure a model on rows of data, and compare it with a baseline."""
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
    save(args, measured.to_json())
    if failures := measured.failures(args.thresholds):
        raise LitLoraError(f"--fail_below: {'; '.join(failures)}")


def save(args: EvaluateArgs, results: Mapping[str, Any]) -> None:
    """Write everything to --out_file, if there is one."""
    if args.out_file is not None:
        content = json.dumps(results, ensure_ascii=False, indent=2) + "\n"
        write_atomically({args.out_file: content.encode(errors="backslashreplace")})
        log(f"results in {args.out_file}")
