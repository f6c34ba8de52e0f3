"""The rows of metrics.csv, and the figures beside the progress of a run."""

from litlora.nn.backend import backend, default_device
from litlora.train.train_state import Progress, StepResult


def row(progress: Progress, result: StepResult, rate: float) -> dict[str, float | None]:
    """Return the row of metrics.csv for a step."""
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "loss": result.loss,
        "val_loss": progress.val_loss,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens": progress.tokens,
        "tokens_per_second": result.tokens / result.seconds,
        "memory_gb": peak_memory_gb(),
    }


def figures(result: StepResult, val_loss: float | None) -> str:
    """Return what the progress display shows of the last step."""
    validation = "" if val_loss is None else f"val {val_loss:.4f}, "
    speed = f"{result.tokens / result.seconds:,.0f} tokens/s"
    return f"loss {result.loss:.4f}, {validation}{speed}, {peak_memory_gb():.2f} GB"


def peak_memory_gb() -> float:
    """Return the most memory, in 10^9 bytes, that the process has had: of the GPU, or resident where there is none."""
    return backend(default_device()).peak_memory() / 1e9
