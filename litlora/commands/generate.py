"""generate: a prompt in, the completion alone on stdout; or a file of prompts in, a file with completions out."""

from time import perf_counter

from litlora.args.inference import GenerateArgs
from litlora.commands.prompt import Prompt, PromptFile
from litlora.generation.llm import LLM
from litlora.utils.console import log, write
from litlora.utils.files import write_atomically
from litlora.utils.progress import track


def generate(args: GenerateArgs, prompt: Prompt | PromptFile | None = None) -> None:
    """Complete prompts with a checkpoint, or with adapters on it; `prompt` is given if it has been read."""
    prompt = prompt or (Prompt.read(args) if args.prompts is None else PromptFile.read(args))
    llm = LLM.open(prompt.files, compiled=args.compile)
    if isinstance(prompt, PromptFile):
        complete_file(llm, args, prompt)
        return
    for texts in llm.samples(prompt.ids, prompt.style, args, args.num_samples):
        for text in texts:
            write(text)
        write("\n")


def complete_file(llm: LLM, args: GenerateArgs, prompts: PromptFile) -> None:
    """Write the rows of --prompts with their completions to --out_file."""
    assert args.out_file is not None
    start, completions = perf_counter(), [""] * len(prompts.ids)
    found = llm.complete(prompts.ids, prompts.style, args, args.batch_size)
    for number, text in track(found, "completions", len(completions)):
        completions[number] = text
    write_atomically({args.out_file: prompts.answered(completions)})
    log(f"{len(completions):,} completions in {args.out_file} ({perf_counter() - start:.1f} s)")
