"""Generation by litlora: the second of two greedy completions is timed."""

import json
import sys
import time
from dataclasses import asdict

from benchmarks.memory import peak_memory_gb

from gpu_checks.cases import Work
from gpu_checks.running import Result
from litlora.generation.llm import LLM

PROMPT = "Tell me a story."


def generate(work: Work) -> Result:
    """Generate, and count the tokens that the tokenizer makes of the text's pieces."""
    llm = LLM.load(work.checkpoint, precision="bf16-true", quantize="bnb.nf4" if work.quantized else None)
    for _ in range(2):
        start = time.perf_counter()
        llm.generate(PROMPT, max_new_tokens=work.new_tokens, temperature=0.0)
        seconds = time.perf_counter() - start
    return Result(f"{work.new_tokens} tokens", work.new_tokens / seconds, measured_gb=peak_memory_gb())


if __name__ == "__main__":
    print(json.dumps(asdict(generate(Work(**json.loads(sys.argv[1]))))))
