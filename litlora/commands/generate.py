"""generate: a prompt in, the completion alone on stdout."""

import torch

from litlora.args.inference import GenerateArgs
from litlora.commands.prompt import Prompt
from litlora.errors import LitLoraError
from litlora.generation.compile import compile_decode_step, prepare_for_decoding
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate_samples
from litlora.lora.checkpoint import load_with_adapters, requested_storage
from litlora.models.checkpoint import Checkpoint
from litlora.nn.backend import backend, default_device
from litlora.utils.console import write


def generate(args: GenerateArgs, prompt: Prompt | None = None) -> None:
    """Complete a prompt with a checkpoint, or with an adapter on its base; `prompt` is given if it has been read."""
    prompt = prompt or Prompt.read(args)
    base, adapters, tokenizer = Checkpoint.open(prompt.base), prompt.adapters, prompt.tokenizer

    device = default_device()
    dtype, quantization = requested_storage(args, adapters)
    if args.compile and quantization:
        raise LitLoraError(f"--compile does not work with a 4-bit base ({quantization.name}): leave one of them out")
    model = load_with_adapters(base, adapters, dtype, device, quantization)
    if args.compile:
        compile_decode_step(model)
    elif args.max_new_tokens * args.num_samples >= backend(device).repacking_pays_from:
        prepare_for_decoding(model)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, torch.Generator(device).manual_seed(args.seed))
    samples = generate_samples(
        model, prompt.ids, sampler, args.num_samples, max_new_tokens=args.max_new_tokens, stop_ids=prompt.stop_ids
    )
    for tokens in samples:
        for text in tokenizer.stream(prompt.ids, tokens):
            write(text)
        write("\n")
