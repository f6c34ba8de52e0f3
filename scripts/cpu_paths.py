"""Measure what each fast path of cpu/ and nn/ gains: the time without it over the time with it.

Both run alternately in one process, on a network of SmolLM2-135M's widths with fewer layers and random weights. Times
are CPU seconds of one thread, which other programs on the machine disturb little; those marked "threads" are wall time.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.cpu import attention, matmul, onednn, tuning, weight_layouts
from litlora.generation.compile import compile_decode_step, prepare_for_decoding
from litlora.generation.session import Session
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.models import transformer
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT
from litlora.nn import backend
from litlora.nn.attention import sdpa_per_sequence
from litlora.nn.backend import CPUBackend, WorkerThreads
from litlora.nn.loss import IGNORE_INDEX, supervised_loss
from litlora.nn.norm import RMSNorm
from litlora.nn.rope import Rope

LENGTHS = (190, 120, 240, 90)
SUPERVISED = 7
"""Every how many tokens one is supervised, which leaves the head its share of the time beside fewer layers."""
CONTEXT = 64
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}

Ablation = Callable[[], AbstractContextManager[object]]


def plain_rotation(x: Tensor, rope: Rope) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((b, a), dim=-1) * rope[1]


def plain_attention(_: object, q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]], window: None) -> Tensor:
    return sdpa_per_sequence(q, k, v, [own for _, own in spans], window)


TRAINING: dict[str, Ablation] = {
    "blocked attention": lambda: patch.object(CPUBackend, "varlen_attention", plain_attention),
    "saved probabilities": lambda: patch.object(attention, "RETAINED_KEYS", 0),
    "padded attention (memory)": lambda: patch.multiple(attention, PAD_QUERIES=1, PAD_KEYS=1),
    "RMSNorm": lambda: patch.object(RMSNorm, "forward", nn.RMSNorm.forward),
    "rotation": lambda: patch.object(transformer, "rotate", plain_rotation),
    "SwiGLU": lambda: patch.object(transformer, "swiglu", lambda gate, up: F.silu(gate) * up),
    "long products in slices": lambda: patch.object(matmul, "LONG_OUTPUTS", 2**60),
    "logits scored in the cache": lambda: patch.object(tuning, "CACHED_LOGITS", 2**60),
}
NO_NATIVE: dict[str, Ablation] = {
    "float32 products for bfloat16": lambda: patch.multiple(
        matmul, has_slow_products=lambda _: False, matmul_dtype=lambda dtype: dtype
    )
}


def shape(layers: int, vocabulary: int) -> GPTConfig:
    hub = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": layers, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True,
    }  # fmt: skip
    return GPTConfig.from_hub(hub)


def network(layers: int, vocabulary: int, dtype: torch.dtype) -> GPT:
    """Return a network whose values bfloat16 holds, as those of most checkpoints."""
    torch.manual_seed(0)
    return GPT(shape(layers, vocabulary)).bfloat16().to(dtype).requires_grad_(False)


def training_step(dtype: torch.dtype, layers: int) -> Callable[[], None]:
    gpt = network(layers, 49152, dtype)
    add_lora(gpt, LoRAConfig(8, 16, 0.0, ("q_proj", "v_proj")))
    matrices = list(lora_parameters(gpt).values())
    tokens = torch.randint(49152, (sum(LENGTHS),))
    labels = torch.where(torch.arange(len(tokens)) % SUPERVISED == 0, tokens, IGNORE_INDEX)

    def step() -> None:
        torch.autograd.grad(supervised_loss(gpt(tokens, LENGTHS), gpt.lm_head, labels), matrices)

    return step


def decoder(dtype: torch.dtype, prepare: Callable[[GPT], None], steps: int, layers: int) -> Callable[[], None]:
    gpt = network(layers, 16384, dtype)
    prepare(gpt)
    session = Session(gpt, CONTEXT + steps + 1)

    @torch.inference_mode()
    def decode() -> None:
        session.cache.length = CONTEXT
        for _ in range(steps):
            session.next_logits(torch.zeros(1, dtype=torch.long))

    return decode


def ratio(
    normal: Callable[[], None],
    ablated: Callable[[], None],
    repetitions: int,
    ablation: Ablation = nullcontext,
    clock: Callable[[], float] = time.process_time,
) -> tuple[float, float]:
    """Return the median time of a function, and by what its ablation takes longer: the median ratio less 1."""
    pairs = []
    for repetition in range(repetitions + 1):
        start = clock()
        normal()
        middle = clock()
        with ablation():
            between = clock()
            ablated()
            end = clock()
        if repetition:  # the first warms up
            pairs.append((middle - start, end - between))
    return median(a for a, _ in pairs), median(b / a for a, b in pairs) - 1


def report(task: str, name: str, measured: tuple[float, float]) -> None:
    seconds, gain = measured
    print(f"{task:14} {name:34} {1000 * seconds:8.1f} ms  {100 * gain:+6.1f} %", flush=True)


def measure_training(name: str, dtype: torch.dtype, layers: int, repetitions: int) -> None:
    step = training_step(dtype, layers)
    for path, ablation in TRAINING.items():
        report(f"train-{name}", path, ratio(step, step, repetitions, ablation))
    if name == "bf16":
        with patch.object(onednn, "HAS_BFLOAT16_PRODUCTS", False):
            for path, ablation in NO_NATIVE.items():
                report("train-bf16, no native", path, ratio(step, step, repetitions, ablation))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def measure_workers(name: str, dtype: torch.dtype, layers: int, repetitions: int) -> None:
    """Compare two micro-batches on a core each with the same two, one after the other, on both cores."""
    step = training_step(dtype, layers)
    with threads(2):
        pool = WorkerThreads(2)
        both = lambda: [*pool.map(lambda _: step(), range(2))] and None  # noqa: E731
        in_turn = lambda: [step() for _ in range(2)] and None  # noqa: E731
        report(f"train-{name}", "worker threads (threads)", ratio(both, in_turn, repetitions, clock=time.perf_counter))


def measure_decoding(name: str, dtype: torch.dtype, layers: int, repetitions: int) -> None:
    steps = 16
    repacked = decoder(dtype, prepare_for_decoding, steps, layers)

    def compared(path: str, prepare: Callable[[GPT], None]) -> None:
        report(f"generate-{name}", path, ratio(repacked, decoder(dtype, prepare, steps, layers), repetitions))

    def without(target: object, attribute: str, replacement: object) -> Callable[[GPT], None]:
        def prepare(gpt: GPT) -> None:
            with patch.object(target, attribute, replacement):
                prepare_for_decoding(gpt)

        return prepare

    compared("all decode preparation", lambda gpt: None)
    compared("repacked weights", without(weight_layouts, "repacked", lambda weight: weight))
    compared("huge pages", without(backend, "move_to_huge_pages", lambda weights: None))
    compared("joint products", without(transformer.Attention, "join", lambda self: None))


def measure_compiled(name: str, dtype: torch.dtype, layers: int, repetitions: int) -> None:
    steps = 16
    compiled = decoder(dtype, compile_decode_step, steps, layers)
    report(
        f"generate-{name}", "compile", ratio(compiled, decoder(dtype, prepare_for_decoding, steps, layers), repetitions)
    )
    for path, target, attribute, value in (
        ("compile: bfloat16 storage", weight_layouts, "in_bfloat16", lambda weight: weight),
        ("compile: interleaved sums", matmul, "COMPILED_SUMS", 1),
        ("compile: huge pages", backend, "move_to_huge_pages", lambda weights: None),
    ):
        torch._dynamo.reset()
        with patch.object(target, attribute, value):
            other = decoder(dtype, compile_decode_step, steps, layers)
        report(f"generate-{name}", path, ratio(compiled, other, repetitions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--layers", type=int, default=6)
    measurements = {"train": measure_training, "workers": measure_workers, "decode": measure_decoding,
                    "compile": measure_compiled}  # fmt: skip
    parser.add_argument("--only", choices=measurements, nargs="*", default=list(measurements))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.only:
        for name, dtype in DTYPES.items():
            measurements[kind](name, dtype, args.layers, args.repetitions)


if __name__ == "__main__":
    main()
