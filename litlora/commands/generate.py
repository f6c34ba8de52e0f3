"""generate: a prompt in, the completion alone on stdout."""

import sys

import torch

from litlora.args import NO_PROMPT, GenerateArgs
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.generation.compile import compile_decode_step, prepare_for_decoding
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate as stream_tokens
from litlora.lora.adapter_folder import find_base, read_prompt_style
from litlora.lora.checkpoint import load_with_adapter, read_quantization
from litlora.models.checkpoint import Checkpoint
from litlora.nn.backend import backend, default_device
from litlora.nn.nf4 import Quantization


def generate(args: GenerateArgs) -> None:
    """Complete a prompt with a checkpoint, or with an adapter on its base."""
    base_dir, adapter_dir = find_base(args.checkpoint_dir, args.base_dir)
    base = Checkpoint.open(base_dir)
    tokenizer = Tokenizer(base.dir, base.hub_config)
    style = tokenizer.prompt_style(args.prompt_style or read_prompt_style(args.checkpoint_dir) or "none")
    prompt = tokenizer.encode(style.prompt(read_prompt(args.prompt)), style.add_special_tokens).ids
    check_length(len(prompt), args.max_new_tokens, base.config.max_position_embeddings)
    base.config.check_ids("the prompt", max(prompt, default=0))

    device = default_device()
    dtype, quantization = storage(args, None if adapter_dir is None else read_quantization(adapter_dir))
    if args.compile and quantization:
        raise LitLoraError(f"--compile does not work with a 4-bit base ({quantization.name}): leave one of them out")
    model = load_with_adapter(base, adapter_dir, dtype, device, quantization)
    if args.compile:
        compile_decode_step(model)
    elif args.max_new_tokens * args.num_samples >= backend(device).repacking_pays_from:
        prepare_for_decoding(model)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, torch.Generator(device).manual_seed(args.seed))
    for _ in range(args.num_samples):
        tokens = stream_tokens(model, prompt, sampler, max_new_tokens=args.max_new_tokens, stop_ids=tokenizer.stop_ids)
        for text in tokenizer.stream(prompt, tokens):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")


def storage(args: GenerateArgs, trained: Quantization | None) -> tuple[torch.dtype, Quantization | None]:
    """Return dtype and quantization of the base: as requested, else as the adapter was trained."""
    dtype = trained.dtype if trained else torch.bfloat16
    if args.precision:
        dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    name = args.quantize or (trained.name if trained else "none")
    return dtype, None if name == "none" else Quantization(name, dtype)


def read_prompt(given: str | None) -> str:
    """Return --prompt, or else standard input without its last line break."""
    prompt = sys.stdin.read().removesuffix("\n") if given is None else given
    if not prompt:
        raise LitLoraError(NO_PROMPT)
    return prompt


def check_length(prompt: int, new: int, positions: int) -> None:
    """Refuse a prompt and completion that together are longer than the model's context."""
    if prompt + new > positions:
        fault = f"the prompt's {prompt} tokens and --max_new_tokens ({new}) are more than the checkpoint's {positions}"
        raise LitLoraError(f"{fault} positions: shorten one of them")
