"""sweep: a search space in, a table of validation losses out, with a run folder for each trial."""

import json

from litlora.args.sweep import SweepArgs
from litlora.distributed.launcher import is_launched
from litlora.errors import LitLoraError
from litlora.report.sweep_page import PAGE, sweep_page
from litlora.sweep.plan import Plan
from litlora.utils.console import log, output
from litlora.utils.files import write_atomically

RESULTS = "sweep.json"


def sweep(args: SweepArgs, plan: Plan | None = None) -> None:
    """Train with all settings of a search space, and compare them; `plan` is given if it has been read."""
    train_and_compare(plan or Plan.read(args))


def train_and_compare(plan: Plan) -> None:
    """Train what is left of a sweep, and print and write its results."""
    from litlora.sweep import results, workers  # with optuna, an extra

    study = workers.work_in_processes(plan) if plan.args.workers > 1 else workers.work(plan)
    if is_launched():
        return  # a worker of the process that reports
    rows = results.rows(plan, study)
    lines, failures = results.table(plan, rows), results.failures(plan, study)
    if rows[0].loss is None:
        raise LitLoraError(f"all trials have failed or were pruned: {'; '.join(failures[:1])}")
    for line in results.aligned(lines):
        output(line)
    for failure in failures:
        log(f"warning: {failure}")
    folder = plan.args.out_dir
    content = json.dumps(results.to_json(plan, study), ensure_ascii=False, indent=2) + "\n"
    page = sweep_page(folder.name, lines, results.chart(rows), failures)
    write_atomically({folder / RESULTS: content.encode(errors="backslashreplace"), folder / PAGE: page.encode()})
    log(f"table and chart in {folder / PAGE}")
