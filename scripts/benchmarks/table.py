"""The Markdown tables of measurements."""

import math
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.cases import LITLORA, LITLORA_COMPILED
from benchmarks.jobs import NEW_TOKENS, PROMPT_TOKENS, Device, Result
from benchmarks.measuring import Measurement, leading


def render(measurements: Mapping[str, Measurement]) -> str:
    """Return all tables, below a line with the machine and the versions."""
    versions: dict[str, str] = {}
    for measurement in measurements.values():
        for results in measurement.results.values():
            versions |= results[0].versions
    devices = dict.fromkeys(machine(measurement.device) for measurement in measurements.values())
    parts = [f"{' and '.join(devices)}; " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."]
    parts += [section(name, measurement) for name, measurement in measurements.items()]
    return "\n\n".join(parts) + "\n"


def machine(device: Device) -> str:
    """Return the name of the GPU, or of the CPU with the number of threads."""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads"


def section(name: str, measurement: Measurement) -> str:
    """Return the title, the table and the notes of a case."""
    columns = TRAINING if measurement.task == "train" else GENERATION
    rows = [[program, *(cell(measurement, program) for cell in columns.values())] for program in measurement.results]
    lines = [f"**{measurement.title}** (`{name}`): {work(measurement)}", "", line(["", *columns])]
    lines += [line(["---", *("--:" for _ in columns)]), *map(line, rows)]
    notes = [*compiling(measurement), *(f"{program}: {why}." for program, why in measurement.missing.items())]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)] if notes else lines)


def work(measurement: Measurement) -> str:
    """Describe the task, the repetitions and the lower bound of the time."""
    results = next(iter(measurement.results.values()), [])
    times = f"repetitions: {len(results)}"
    if not results or measurement.task == "generate":
        return f"{NEW_TOKENS} tokens after {PROMPT_TOKENS}, greedy, {times}."
    counts = f"{results[0].tokens:,} tokens, {results[0].supervised:,} of them supervised"
    text = f"{measurement.rows} rows with {counts}, {times}"
    if not measurement.products:
        return f"{text}."
    best = median(products.rate for products in measurement.products) / 1e9
    return f"{text}; the limit is {limit(measurement):.1f} s, at {best:.0f} GFLOP/s."


def limit(measurement: Measurement) -> float:
    result = next(iter(measurement.results.values()))[0]
    return median(products.limit(result.tokens, result.supervised) for products in measurement.products)


def compiling(measurement: Measurement) -> list[str]:
    """Describe the cost of compilation, and after how many tokens it pays off."""
    compiled, eager = (measurement.results.get(p.name) for p in (LITLORA_COMPILED, LITLORA))
    if not compiled or not eager:
        return []
    cost = median(result.compile_seconds for result in compiled)
    saved = middle(eager) - middle(compiled)
    tokens = math.ceil(cost / saved * eager[0].tokens) if saved > 0 else 0
    worth = f"pays off after {tokens:,} tokens" if tokens else "never pays off"
    return [f"{LITLORA_COMPILED.name} first compiles for {cost:.1f} s, which {worth}."]


def middle(results: Sequence[Result]) -> float:
    return median(result.seconds for result in results)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return median, minimum and maximum."""
    center, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{center} ({least} to {most})"


def seconds(measurement: Measurement, program: str) -> str:
    return spread([result.seconds for result in measurement.results[program]])


def ratio(measurement: Measurement, program: str) -> str:
    """Return the time relative to the first program's."""
    first = next(iter(measurement.results.values()))
    return f"{middle(measurement.results[program]) / middle(first):.2f}"


def rate(measurement: Measurement, program: str) -> str:
    return spread([result.tokens / result.seconds for result in measurement.results[program]])


def memory(measurement: Measurement, program: str) -> str:
    return f"{median(result.memory_gb for result in measurement.results[program]):.2f}"


def share(measurement: Measurement, program: str) -> str:
    return f"{limit(measurement) / middle(measurement.results[program]):.0%}"


def same_tokens(measurement: Measurement, program: str) -> str:
    """Return the number of tokens identical to the first program's, before the first difference."""
    first = next(iter(measurement.results.values()))[0]
    return str(leading(first.ids, measurement.results[program][0].ids))


TRAINING: dict[str, Callable[[Measurement, str], str]] = {
    "seconds: median (least to most)": seconds,
    "× the first's": ratio,
    "tokens/s": rate,
    "peak memory, GB": memory,
    "share of the limit": share,
}
GENERATION: dict[str, Callable[[Measurement, str], str]] = {
    "tokens/s: median (least to most)": rate,
    "seconds, × the first's": ratio,
    "peak memory, GB": memory,
    "same tokens": same_tokens,
}
