"""Answers of llama.cpp itself for a list of models, in a process of its own: it prints, and may abort.

Reads a JSON list of requests {"model", "adapter", "prompts", "tokens"} from standard input, where a prompt is a text
or a list of ids, and writes a JSON list: for each prompt the ids that it chose and their log-probabilities.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def server(model: str, adapter: str | None) -> xllamacpp.Server:
    """Load a model in float32, on one thread."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_batch, params.n_parallel, params.n_gpu_layers = 256, 256, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = params.fit_params = False
    params.cache_prompt, params.cache_ram_mib, params.verbosity = False, 0, 1
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return xllamacpp.Server(params)


def complete(llama: xllamacpp.Server, prompt: str | list[int], tokens: int) -> list[tuple[int, float]]:
    """Return the greedy tokens after a prompt with their log-probabilities."""
    request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": 1}
    request |= {"samplers": ["temperature"], "cache_prompt": False}
    answer = llama.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp: {answer}")
    logprobs = answer["choices"][0]["logprobs"] or {"content": []}  # where the first token ends the text
    return [(entry["id"], entry["logprob"]) for entry in logprobs["content"]]


def answers(requests: list[dict[str, Any]]) -> list[list[list[tuple[int, float]]]]:
    """Have a process answer requests."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    child = subprocess.run(
        [sys.executable, Path(__file__)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


if __name__ == "__main__":
    out = []
    for request in json.load(sys.stdin):
        llama = server(request["model"], request.get("adapter"))
        out.append([complete(llama, prompt, request["tokens"]) for prompt in request["prompts"]])
        del llama
    sys.stderr.flush()
    print()
    print(json.dumps(out), flush=True)
    os._exit(0)
