"""The training loop: steps, validation, logging and saving."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain

import torch
from torch import Tensor
from torch.optim import Optimizer

from litlora.args.finetune import EvalArgs, TrainArgs
from litlora.data.batching import (
    DUMMY_MICRO_BATCH,
    Batching,
    MicroBatch,
    Sample,
    Samples,
    is_alone,
    split_across_ranks,
    with_dropout_seeds,
)
from litlora.distributed.process_group import Ranks
from litlora.errors import LitLoraError
from litlora.evaluation.engine import Engine
from litlora.evaluation.validation import ValLoss
from litlora.lora.layer import lora_parameters
from litlora.train.loggers import Loggers
from litlora.train.metrics import figures, row
from litlora.train.optimizers import set_learning_rate
from litlora.train.run_dir import RunFolder
from litlora.train.samples import SampleRows
from litlora.train.schedule import learning_rate, steps, total_steps
from litlora.train.train_state import Best, Progress, StepResult
from litlora.utils.console import log
from litlora.utils.progress import task
from litlora.utils.signals import StopRequest


@dataclass(frozen=True)
class Run:
    """What the loop trains, on which samples, and where it saves."""

    engine: Engine
    optimizer: Optimizer
    samples: Samples
    train: TrainArgs
    eval: EvalArgs
    seed: int
    validate: Callable[[int], ValLoss]
    """Validates the present adapter, prints what the validation of this step shows, and returns the loss."""
    folder: RunFolder
    completions: SampleRows
    loggers: Loggers
    stop: StopRequest

    def record(self, **values: float | None) -> None:
        """Log what was measured at a step to metrics.csv and the other loggers."""
        self.folder.log(**values)
        self.loggers.log(values)


def fit(run: Run, progress: Progress) -> None:
    """Train from the step of `progress` to the last one, unless --eval.patience or a stop request ends the run."""
    gpt, total = run.engine.gpt, total_steps(len(run.samples), run.train)
    epochs = steps(run.samples, run.train.global_batch_size, run.seed, after=progress.step, total=total)
    val_loss = None
    if progress.step == 0 and run.eval.initial_validation:
        val_loss = run.validate(0).mean
        run.record(step=0, epoch=0, val_loss=val_loss)
    with task("training", total, done=progress.step, is_main=True) as bar:
        for epoch, step, batch in epochs:
            if is_out_of_patience(progress.best, run.eval.patience, progress.step):
                break
            rate = learning_rate(step, total, run.train)
            result = train_step(run, batch, rate, step)
            progress.add(epoch, result)
            if step % run.eval.interval == 0 or (step == total and run.eval.final_validation):
                validation = run.validate(step)
                val_loss = validation.mean
                progress.validated(validation, lora_parameters(gpt) if run.eval.keep_best else {})
            if progress.val_loss is not None or step % run.train.log_interval == 0:
                run.record(**row(progress, result, rate))
            code = run.engine.ranks.all_reduce_max(run.stop.exit_code()) if step < total else 0
            if code or step % run.train.save_interval == 0:
                saved = run.folder.save_step(gpt, run.optimizer, progress)
            bar.advance(figures=figures(result, val_loss))
            if code:
                raise run.stop.error(code, f"after step {step} of {total}, which is saved in {saved}")


def is_out_of_patience(best: Best, patience: int | None, step: int) -> bool:
    """Tell, and print, whether `patience` validations in a row have not been better than the best."""
    if patience is None or best.beaten < patience:
        return False
    since = f"no validation has been better than that of step {best.step} ({best.loss:.4f})"
    log(f"stopped early after step {step}: {since}")
    return True


def train_step(run: Run, batch: Sequence[Sample], rate: float, step: int) -> StepResult:
    """Take one optimizer step on a global batch, with the mean over all its supervised tokens as the loss."""
    start, engine = time.perf_counter(), run.engine
    seed_rank(engine.ranks, run.seed, step)
    micros = with_dropout_seeds(local_micro_batches(batch, Batching.of(run.train), engine.ranks))
    supervised = sum(sample.supervised for sample in batch)
    loss = forward_backward(engine, micros, supervised, run.train.token_limit)
    max_norm = run.train.max_norm or math.inf  # an infinite limit measures the norm and clips nothing
    norm = engine.fabric.clip_gradients(engine.gpt, run.optimizer, max_norm=max_norm, error_if_nonfinite=False)
    mean, grad_norm = loss.item(), float(norm)  # type: ignore[arg-type]
    if not math.isfinite(mean) or not math.isfinite(grad_norm):
        raise not_finite(f"step {step} has the loss {mean} and a gradient norm of {grad_norm}", batch)
    set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    run.optimizer.zero_grad()
    tokens = sum(len(sample.tokens) for sample in batch)
    return StepResult(mean, grad_norm, tokens, supervised, time.perf_counter() - start)


def forward_backward(engine: Engine, micros: Sequence[MicroBatch], supervised: int, limit: int | None = None) -> Tensor:
    """Compute the gradients of a step on all ranks, and return its mean loss over `supervised` tokens.

    Micro-batches beyond the limit of tokens come first, and none is concurrent to them.
    """
    parameters = list(lora_parameters(engine.gpt).values())
    loss = torch.zeros((), device=engine.fabric.device)
    work = partial(loss_and_gradients, engine, parameters, supervised)
    alone = [micro for micro in micros if is_alone(micro.lengths, limit)]
    for summand, gradients in chain(map(work, alone), engine.workers.map(work, micros[len(alone) :])):
        loss += summand
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.contiguous() if parameter.grad is None else parameter.grad.add_(gradient)
    return engine.ranks.all_reduce_gradients(parameters, loss)


def loss_and_gradients(
    engine: Engine, parameters: Sequence[Tensor], supervised: int, micro: MicroBatch
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return a micro-batch's summand of the mean loss over `supervised` tokens, and its gradients.

    They are not summed here: the sum must be the same bit for bit, whichever worker thread finishes first.
    """
    loss = engine.summed_loss(micro) / supervised
    return loss.detach(), torch.autograd.grad(loss, parameters)


def local_micro_batches(batch: Sequence[Sample], batching: Batching, ranks: Ranks) -> list[MicroBatch]:
    """Return the micro-batches of this rank's share of a global batch, padded to the largest number on any rank.

    The longest comes first: a worker thread that finishes early has a short one left to take.
    """
    shares = split_across_ranks(batch, [len(sample.tokens) for sample in batch], ranks.world_size)
    micros = [batching.micro_batches(share) for share in shares]
    local = sorted(micros[ranks.rank], key=lambda micro: -len(micro.tokens))
    return local + [DUMMY_MICRO_BATCH] * (max(map(len, micros)) - len(local))


def seed_rank(ranks: Ranks, seed: int, step: int) -> None:
    """Give each rank but the first random numbers of its own for a step.

    They follow from the step, so that a checkpoint needs the random state of rank 0 only.
    """
    if not ranks.is_first:
        source = f"{seed} {step} {ranks.rank}"
        torch.manual_seed(int.from_bytes(sha256(source.encode()).digest()[:8], "big"))


def not_finite(fault: str, batch: Sequence[Sample]) -> LitLoraError:
    """Name the examples on which a step failed."""
    rows = ", ".join(str(sample.row) for sample in sorted(batch, key=lambda sample: sample.row))
    hint = "lower --train.learning_rate, or look at these rows; what is saved so far stays"
    return LitLoraError(f"{fault} on train.jsonl rows {rows} (the first row is 1): {hint}")
