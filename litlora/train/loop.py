"""The training loop: steps, validation, logging and saving."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain, islice, zip_longest

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from litlora.args import FinetuneLoraArgs
from litlora.data.batching import (
    DUMMY_MICRO_BATCH,
    MicroBatch,
    Sample,
    Samples,
    micro_batches,
    optimize_layout,
    sequential_batches,
    split_across_ranks,
    with_dropout_seeds,
)
from litlora.distributed.process_group import Ranks
from litlora.errors import LitLoraError
from litlora.lora.layer import lora_parameters
from litlora.models.transformer import GPT, evaluating
from litlora.nn.backend import WorkerThreads, backend, compute_dtype
from litlora.nn.dropout import drawing_from
from litlora.nn.loss import supervised_loss
from litlora.train.metrics import row
from litlora.train.run_dir import RunFolder
from litlora.train.schedule import learning_rate, steps, total_steps
from litlora.train.train_state import Progress, StepResult
from litlora.utils.signals import StopRequest


@dataclass(frozen=True)
class Run:
    """What the loop works with, all of it ready."""

    fabric: Fabric
    gpt: GPT
    optimizer: Optimizer
    train: Samples
    val: Samples
    args: FinetuneLoraArgs
    folder: RunFolder
    answer: Callable[[], str]
    """Gives the model's present answer to the example that is shown at each validation; "" for none."""
    stopping: StopRequest
    ranks: Ranks
    workers: WorkerThreads


def fit(run: Run, progress: Progress) -> None:
    """Train from where `progress` stands to the last step, unless validation says, or the run is told, to stop."""
    args, total = run.args, total_steps(len(run.train), run.args.train)
    with tqdm(total=total, initial=progress.step, unit="step", file=sys.stderr, mininterval=_talk_interval()) as bar:
        if progress.step == 0 and args.eval.initial_validation:
            run.folder.log(step=0, epoch=0, val_loss=validate_and_show(run, 0))
        for epoch, step, batch in steps(run.train, args, after=progress.step, total=total):
            if is_out_of_patience(run, progress):
                break
            rate = learning_rate(step, total, args.train)
            result = train_step(run, batch, rate, step)
            progress.add(epoch, result)
            if step % args.eval.interval == 0 or (step == total and args.eval.final_validation):
                progress.validated(
                    validate_and_show(run, step), lora_parameters(run.gpt) if args.eval.keep_best else {}
                )
            if progress.val_loss is not None or step % args.train.log_interval == 0:
                run.folder.log(**row(progress, result, rate))
            code = run.ranks.all_reduce_max(run.stopping.exit_code()) if step < total else 0
            if code or step % args.train.save_interval == 0:
                saved = run.folder.save_step(run.gpt, run.optimizer, progress)
            bar.set_postfix_str(
                f"loss {result.loss:.4f}, {result.tokens / result.seconds:,.0f} tokens/s", refresh=False
            )
            bar.update()
            if code:
                raise run.stopping.error(code, f"after step {step} of {total}, which is saved in {saved}")


def is_out_of_patience(run: Run, progress: Progress) -> bool:
    """Tell whether too many validations in a row have not been better than the best, and say so."""
    best, patience = progress.best, run.args.eval.patience
    if patience is None or best.beaten < patience:
        return False
    since = f"no validation has been better than that of step {best.step} ({best.loss:.4f})"
    tqdm.write(f"stopped early after step {progress.step}: {since}", file=sys.stderr)
    return True


def _talk_interval() -> float:
    return 0.1 if sys.stderr.isatty() else 10.0  # seconds between updates; a log file needs fewer


def train_step(run: Run, batch: Sequence[Sample], rate: float, step: int) -> StepResult:
    """Take one optimizer step on a global batch, with the mean over all its supervised tokens as the loss."""
    start = time.perf_counter()
    supervised = sum(sample.supervised for sample in batch)
    draw_apart(run, step)
    matrices = list(lora_parameters(run.gpt).values())
    loss = torch.zeros((), device=run.fabric.device)
    there_and_back = partial(loss_and_gradients, run, matrices, supervised)
    for part, gradients in run.workers.map(there_and_back, with_dropout_seeds(passes(run, batch))):
        loss += part
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient.contiguous() if matrix.grad is None else matrix.grad.add_(gradient)
    loss = run.ranks.all_reduce_gradients(matrices, loss)
    max_norm = run.args.train.max_norm or math.inf  # an infinite limit measures the norm and clips nothing
    norm = run.fabric.clip_gradients(run.gpt, run.optimizer, max_norm=max_norm, error_if_nonfinite=False)
    mean, grad_norm = loss.item(), float(norm)  # type: ignore[arg-type]
    if not math.isfinite(mean) or not math.isfinite(grad_norm):
        raise not_finite(f"step {step} has the loss {mean} and a gradient norm of {grad_norm}", batch)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad()
    tokens = sum(len(sample.tokens) for sample in batch)
    return StepResult(mean, grad_norm, tokens, supervised, time.perf_counter() - start)


def passes(run: Run, batch: Sequence[Sample]) -> list[MicroBatch]:
    """Return the micro-batches of this rank's share of a global batch, filled up to as many as any rank has.

    The longest comes first: a lane that is done early has a short one left to take.
    """
    train, lengths = run.args.train, [len(sample.tokens) for sample in batch]
    shares = split_across_ranks(batch, lengths, run.ranks.world_size)
    dealt = [micro_batches(share, train.micro_batch_size, train.micro_batch_tokens) for share in shares]
    own = sorted(dealt[run.ranks.rank], key=lambda micro: -len(micro.tokens))
    return own + [DUMMY_MICRO_BATCH] * (max(map(len, dealt)) - len(own))


def draw_apart(run: Run, step: int) -> None:
    """Give each rank but the first random numbers of its own for a step.

    They follow from the step, so that a checkpoint need hold no generator but the first rank's.
    """
    if not run.ranks.is_first:
        source = f"{run.args.seed} {step} {run.ranks.rank}"
        torch.manual_seed(int.from_bytes(sha256(source.encode()).digest()[:8], "big"))


def not_finite(fault: str, batch: Sequence[Sample]) -> LitLoraError:
    """Name the examples that a step failed on."""
    rows = ", ".join(str(sample.row) for sample in sorted(batch, key=lambda sample: sample.row))
    hint = "lower --train.learning_rate, or look at these rows; what is saved so far stays"
    return LitLoraError(f"{fault} on train.jsonl rows {rows} (the first row is 1): {hint}")


def summed_loss(run: Run, micro: MicroBatch) -> Tensor:
    """Return the sum of the losses of a micro-batch's supervised tokens; training and validation share it."""
    micro = optimize_layout(micro, backend(run.fabric.device), compute_dtype(run.args.precision))
    tokens, labels = run.fabric.to_device((micro.tokens, micro.labels))
    with run.fabric.autocast(), drawing_from(torch.Generator().manual_seed(micro.seed)):
        return supervised_loss(run.gpt(tokens, micro.lengths, shared=micro.shared), run.gpt.lm_head, labels)


def loss_and_gradients(
    run: Run, matrices: Sequence[Tensor], supervised: int, micro: MicroBatch
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return a micro-batch's part of a mean over so many supervised tokens, and of the gradient for the matrices.

    The gradients are not added up here: their sum must be the same to the bit, whichever lane is done first.
    """
    loss = summed_loss(run, micro) / supervised
    return loss.detach(), torch.autograd.grad(loss, matrices)


@torch.no_grad()  # which holds for one lane alone
def loss_alone(run: Run, micro: MicroBatch) -> tuple[float, int]:
    """Return the sum of a micro-batch's losses, and over how many tokens it is."""
    return summed_loss(run, micro).item(), micro.supervised


def validate(run: Run) -> float:
    """Return the mean loss over the supervised tokens of the validation split, or of its first micro-batches."""
    train, total, supervised = run.args.train, 0.0, 0
    groups = sequential_batches(run.val, train.global_batch_size)
    batches = chain.from_iterable(
        micro_batches(group, train.micro_batch_size, train.micro_batch_tokens) for group in groups
    )
    with evaluating(run.gpt):
        in_turn = [islice(batches, run.args.eval.max_iters)] * run.ranks.world_size
        own = (dealt[run.ranks.rank] for dealt in zip_longest(*in_turn, fillvalue=DUMMY_MICRO_BATCH))
        for loss, tokens in run.workers.map(partial(loss_alone, run), own):
            total += loss
            supervised += tokens
    sums = run.ranks.all_reduce(torch.tensor([total, supervised], dtype=torch.float64, device=run.fabric.device))
    return float(sums[0] / sums[1])


def validate_and_show(run: Run, step: int) -> float:
    """Validate, and say the loss and a sample answer on stderr."""
    val_loss = validate(run)
    tqdm.write(f"step {step}: validation loss {val_loss:.4f}", file=sys.stderr)
    if answer := run.answer():
        tqdm.write(answer, file=sys.stderr)
    return val_loss
