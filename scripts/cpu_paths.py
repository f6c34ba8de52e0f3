"""Measure what each fast path of cpu/ and nn/ gains: the time without it over the time with it.

Both run alternately in one process, on SmolLM2-135M's widths with random weights, as a user runs them: a training step
is two micro-batches of Alpaca's lengths on two worker threads, and all cores decode one token. Printed are the median
time with the path, the median gain and its quartiles, the same in CPU seconds, and the gain of the best times, which
says most on a busy machine. Memory is that of the whole network's weights and of what forward saves for backward.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

from litlora.cpu.environment import let_threads_sleep

if "--spin" not in sys.argv:
    let_threads_sleep()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.cpu import attention, matmul, tuning, weight_layouts
from litlora.cpu.allocator import configure_for_training
from litlora.generation import compile as compilation
from litlora.generation.compile import compile_decode_step, prepare_for_decoding
from litlora.generation.session import Session
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.models import transformer
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT
from litlora.nn import cpu_backend
from litlora.nn.attention import sdpa_per_sequence
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.backend_interface import WorkerThreads
from litlora.nn.cpu_backend import CPUBackend
from litlora.nn.loss import IGNORE_INDEX, supervised_loss
from litlora.nn.norm import RMSNorm

LAYERS, VOCABULARY = 30, 49152
LENGTHS = (150, 85, 130, 75)
LONG = (1024,)
PREFIX = 26
"""Tokens of the text with which Alpaca's prompts begin."""
FEW_LAYERS, SUPERVISED = 1, 60
"""Layers of most training steps, and every how many tokens one is supervised: the output head has its usual share."""
CONTEXT = 64
TOKENS = 2
"""Tokens that are decoded in one measurement."""
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
WITHOUT_BFLOAT16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

Step = Callable[[], Any]
Ablation = Callable[[], AbstractContextManager[object]]


def plain_attention(
    _: object, q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]], spec: AttentionSpec
) -> Tensor:
    return sdpa_per_sequence(q, k, v, [own for _, own in spans], spec)


def plain_rotation(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (x * rope[0] + torch.cat((b, a), dim=-1) * rope[1]).to(x.dtype)


ATTENTION: dict[str, Ablation] = {
    "blocked attention": lambda: patch.object(CPUBackend, "varlen_attention", plain_attention),
    "saved probabilities": lambda: patch.object(attention, "RETAINED_KEYS", 0),
}
BLOCKS: dict[str, Ablation] = ATTENTION | {
    "padded attention": lambda: patch.multiple(attention, PAD_QUERIES=1, PAD_KEYS=1),
    "rotation": lambda: patch.object(transformer, "rotate", plain_rotation),
    "RMSNorm": lambda: patch.object(RMSNorm, "forward", nn.RMSNorm.forward),
    "SwiGLU": lambda: patch.object(transformer, "gated", lambda gate, up, _: F.silu(gate) * up),
}
HEAD: dict[str, Ablation] = {
    "many outputs in slices": lambda: patch.object(matmul, "LONG_OUTPUTS", 2**60),
    "logits scored in the cache": lambda: patch.object(tuning, "CACHED_LOGITS", 2**60),
}


def network(layers: int, dtype: torch.dtype) -> GPT:
    """Return a network whose values bfloat16 holds, as those of most checkpoints."""
    hub = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    return GPT(GPTConfig.from_hub(hub)).bfloat16().to(dtype).requires_grad_(False)


def with_adapter(layers: int, dtype: torch.dtype) -> GPT:
    gpt = network(layers, dtype)
    add_lora(gpt, LoRAConfig(8, 16, 0.0, ("q_proj", "v_proj")))
    return gpt


def micro_batch(gpt: GPT, lengths: tuple[int, ...], every: int, shared: tuple[int, ...] = ()) -> Step:
    """Return the forward and backward pass of one micro-batch."""
    matrices = list(lora_parameters(gpt).values())
    tokens = torch.randint(VOCABULARY, (sum(lengths),))
    labels = torch.where(torch.arange(len(tokens)) % every == 0, tokens, IGNORE_INDEX)

    def step() -> None:
        torch.autograd.grad(supervised_loss(gpt(tokens, lengths, shared=shared), gpt.lm_head, labels), matrices)

    return step


def concurrently(micro: Step) -> Step:
    pool = WorkerThreads(2)
    return lambda: list(pool.map(lambda _: micro(), range(2)))


def decoder(dtype: torch.dtype, prepare: Callable[[GPT], None]) -> Step:
    gpt = network(LAYERS, dtype)
    prepare(gpt)
    session = Session(gpt, CONTEXT + TOKENS + 1)

    @torch.inference_mode()
    def decode() -> None:
        session.cache.length = CONTEXT
        for _ in range(TOKENS):
            session.next_logits(torch.zeros(1, dtype=torch.long))

    return decode


def seconds(step: Step, ablation: Ablation = nullcontext) -> tuple[float, float]:
    """Return the wall time of a step, and the CPU seconds of all its threads."""
    with ablation():
        start, used = time.perf_counter(), time.process_time()
        step()
        return time.perf_counter() - start, time.process_time() - used


def compare(task: str, name: str, pairs: int, normal: Step, ablated: Step, ablation: Ablation = nullcontext) -> None:
    """Print the median time of a step, and by what its ablation takes longer, in wall time and CPU seconds."""
    times = [(seconds(normal), seconds(ablated, ablation)) for _ in range(pairs + 1)][1:]  # the first warms up
    gains = []
    for clock in (0, 1):
        ratios = [100 * (without[clock] / usual[clock] - 1) for usual, without in times]
        low, middle, high = quantiles(ratios, n=4)
        gains.append(f"{middle:+7.1f} % ({low:+6.1f} to {high:+6.1f})")
    usual = 1000 * median(usual[0] for usual, _ in times)
    best = 100 * (min(without[0] for _, without in times) / min(usual[0] for usual, _ in times) - 1)
    print(f"{task:13} {name:36} {usual:8.1f} ms {gains[0]} CPU {gains[1]} best {best:+.1f} %", flush=True)


def saved_bytes(gpt: GPT, lengths: tuple[int, ...]) -> int:
    """Return the bytes that the forward pass of a whole network saves for the backward pass, weights excluded."""
    frozen = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = gpt(torch.randint(VOCABULARY, (sum(lengths),)), lengths)
    del hidden
    return sum(saved.values()) * LAYERS // len(gpt.model.layers)


def measure_memory(name: str, dtype: torch.dtype, pairs: int) -> None:
    gpt = with_adapter(FEW_LAYERS, dtype)
    weights = 134_515_008 * dtype.itemsize
    for size, lengths in (("", LENGTHS), (", 1024 tokens", LONG)):
        usual = saved_bytes(gpt, lengths)
        for path, ablation in BLOCKS.items():
            with ablation():
                other = saved_bytes(gpt, lengths)
            gain = 100 * (other - usual) / (weights + 2 * usual)  # two micro-batches at one time
            print(f"memory-{name:9} {path + size:36} {usual / 2**20:8.1f} MiB {2 * gain:+6.1f} %", flush=True)


def measure_training(name: str, dtype: torch.dtype, pairs: int) -> None:
    gpt = with_adapter(FEW_LAYERS, dtype)
    step = concurrently(micro_batch(gpt, LENGTHS, SUPERVISED))
    for path, ablation in BLOCKS.items():
        compare(f"train-{name}", path, pairs, step, step, ablation)
    long = concurrently(micro_batch(gpt, LONG, SUPERVISED))
    for path, ablation in ATTENTION.items():
        compare(f"train-{name}", f"{path}, 1024 tokens", pairs, long, long, ablation)
    first, *others = LENGTHS
    shared, own = (0, *(PREFIX for _ in others)), (first, *(length - PREFIX for length in others))
    compare(f"train-{name}", "shared prefixes", pairs, concurrently(micro_batch(gpt, own, SUPERVISED, shared)), step)


def measure_head(name: str, dtype: torch.dtype, pairs: int) -> None:
    step = concurrently(micro_batch(with_adapter(2, dtype), LENGTHS, 20))
    for path, ablation in HEAD.items():
        compare(f"train-{name}", path, pairs, step, step, ablation)


def measure_workers(name: str, dtype: torch.dtype, pairs: int) -> None:
    """Compare two micro-batches on a core each with the same two, one after the other, on both cores."""
    micro = micro_batch(with_adapter(FEW_LAYERS, dtype), LENGTHS, SUPERVISED)
    compare(f"train-{name}", "worker threads", pairs, concurrently(micro), lambda: (micro(), micro()))


def patched(prepare: Callable[[GPT], None], target: object, attribute: str, value: object) -> Callable[[GPT], None]:
    def prepare_without(gpt: GPT) -> None:
        with patch.object(target, attribute, value):
            prepare(gpt)

    return prepare_without


def measure_decoding(name: str, dtype: torch.dtype, pairs: int) -> None:
    task = f"generate-{name}"
    repacked = decoder(dtype, prepare_for_decoding)
    compare(task, "all preparation", pairs, repacked, decoder(dtype, lambda _: None))
    for path, target, attribute, value in (
        ("repacked weights", weight_layouts, "repacked", lambda weight: weight),
        ("huge pages", cpu_backend, "move_to_huge_pages", lambda _: None),
        ("joint products", compilation, "join", lambda _: None),
    ):
        prepare = patched(prepare_for_decoding, target, attribute, value)
        compare(task, path, pairs, repacked, decoder(dtype, prepare))


def measure_compiled(name: str, dtype: torch.dtype, pairs: int) -> None:
    task = f"compiled-{name}"
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]  # for all variants in one process
    compiled = decoder(dtype, compile_decode_step)
    compare(task, "compile", pairs, compiled, decoder(dtype, prepare_for_decoding))
    for path, target, attribute, value in (
        ("bfloat16 storage", weight_layouts, "in_bfloat16", lambda weight: weight),
        ("huge pages", cpu_backend, "move_to_huge_pages", lambda _: None),
        ("joint products", compilation, "join", lambda _: None),
        ("interleaved sums", matmul, "COMPILED_SUMS", 1),
    ):
        # Other options, or the compiler would take what it compiled before.
        options = compilation.OPTIONS | ({"comment_origin": True} if path == "interleaved sums" else {})
        with patch.object(compilation, "OPTIONS", options):
            other = decoder(dtype, patched(compile_decode_step, target, attribute, value))
        compare(task, path, pairs, compiled, other)


def measure_no_bfloat16(name: str, dtype: torch.dtype, pairs: int) -> None:
    """Compare float32 products with torch's own of bfloat16, on a CPU that is made to look older."""
    if name != "bf16":
        return
    run_self("no-bfloat16-process", WITHOUT_BFLOAT16)


def no_bfloat16_process() -> None:
    plain = lambda: patch.multiple(  # noqa: E731
        matmul, has_slow_products=lambda _: False, matmul_dtype=lambda dtype: dtype
    )
    step = concurrently(micro_batch(with_adapter(1, torch.bfloat16), LENGTHS, 60))
    compare("train-bf16, AVX2", "float32 products", 2, step, step, plain)


PADDING = ("padded", "unpadded-attention", "unpadded")


def measure_padding(name: str, dtype: torch.dtype, pairs: int) -> None:
    """Compare the peak memory after steps of many shapes, with the padding and without it."""
    if name == "bf16":
        for kind in PADDING:
            run_self(kind, {})


def padding_process(kind: str) -> None:
    configure_for_training()
    gpt = with_adapter(2, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    multiple = 1 if kind == "unpadded" else tuning.PAD_MULTIPLE
    with (
        nullcontext() if kind == "padded" else BLOCKS["padded attention"](),
        patch.object(CPUBackend, "pad_multiple", lambda self, rows, dtype: multiple),
    ):
        for _ in range(60):
            lengths = torch.randint(40, 200, (4,), generator=generator).tolist()
            lengths[-1] += -sum(lengths) % multiple
            micro_batch(gpt, tuple(lengths), 2)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"memory-bf16      {kind:36} {peak:8.1f} MiB at most after 60 steps of two layers", flush=True)


def measure_waiting(name: str, dtype: torch.dtype, pairs: int) -> None:
    """Print step times of processes whose threads spin while they wait, and sleep."""
    if name == "32":
        for _ in range(2):
            run_self("waiting-process", {}, "--spin")
            run_self("waiting-process", {})


def waiting_process() -> None:
    kind = os.environ.get("OMP_WAIT_POLICY", "spinning")
    for name, dtype in DTYPES.items():
        micro = micro_batch(with_adapter(FEW_LAYERS, dtype), LENGTHS, SUPERVISED)
        steps = {
            "two workers": concurrently(micro),
            "one micro-batch": micro,
            "generate": decoder(dtype, prepare_for_decoding),
        }
        for task, step in steps.items():
            times = [seconds(step)[0] for _ in range(8)][1:]
            low, middle, high = quantiles([1000 * s for s in times], n=4)
            print(f"{kind:16} {name + ', ' + task:36} {middle:8.1f} ms ({low:.1f} to {high:.1f})", flush=True)


def run_self(process: str, variables: dict[str, str], *flags: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | variables
    subprocess.run([sys.executable, __file__, "--process", process, *flags], env=environment, check=True)


MEASUREMENTS = {
    "train": measure_training, "workers": measure_workers, "head": measure_head, "memory": measure_memory,
    "decode": measure_decoding, "compile": measure_compiled, "no-bfloat16": measure_no_bfloat16,
    "padding": measure_padding, "waiting": measure_waiting,
}  # fmt: skip
PROCESSES: dict[str, Callable[[], None]] = {
    "no-bfloat16-process": no_bfloat16_process,
    "waiting-process": waiting_process,
    **{kind: partial(padding_process, kind) for kind in PADDING},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=25, help="how often a step and its ablation are measured")
    parser.add_argument("--only", choices=MEASUREMENTS, nargs="*", default=list(MEASUREMENTS))
    parser.add_argument("--process", choices=PROCESSES, help="what a process of its own measures")
    parser.add_argument("--spin", action="store_true", help="leave OpenMP's threads to spin while they wait")
    args = parser.parse_args()
    if args.process:
        PROCESSES[args.process]()
        return
    for kind in args.only:
        start = time.perf_counter()
        for name, dtype in DTYPES.items():
            MEASUREMENTS[kind](name, dtype, args.pairs)
        print(f"# {kind}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
