"""The process in which llama.cpp computes: a request as JSON on standard input, the answer as the last line of output.

A request has "model", "adapter" (or null), "threads", "sequences": pairs of token ids and the number of the first one
that is to be scored, "texts", which are to be tokenized, and "stops": tokens at which a generation should end. The
answer has "log_probs" of all tokens but the first of each sequence, null where llama.cpp gives none, "tokens" of each
text, and "ends": those of the stops at which a generation ends.
"""

import json
import os
import sys
import urllib.request
from typing import Any

import xllamacpp

FORCED = 1e6  # what is added to the logit of a token so that it is chosen; its reported probability has it not


def serve(model: str, adapter: str | None, length: int, threads: int) -> Any:
    """Load a model with a float32 cache."""
    params = xllamacpp.CommonParams()
    for own in (params.cpuparams, params.cpuparams_batch):
        own.n_threads, own.poll = threads, 0  # threads that spin stand still where other programs have the cores
    params.model.path = model
    params.n_ctx = params.n_batch = max(length, 64)
    params.n_parallel, params.n_gpu_layers, params.n_threads_http = 1, 0, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = params.fit_params = False
    params.cache_ram_mib, params.verbosity = 0, 1
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return xllamacpp.Server(params)


def chosen(server: Any, prefix: list[int], token: int) -> dict[str, Any]:
    """Have a generation after some tokens begin with a token, and return what llama.cpp says of it."""
    request = {"prompt": prefix, "n_predict": 1, "n_probs": 1, "temperature": 0, "samplers": ["temperature"]}
    answer = server.handle_completions(request | {"logit_bias": [[token, FORCED]], "cache_prompt": True})
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "choices" not in answer:
        raise SystemExit(str(answer.get("error", answer)))
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def log_prob(server: Any, prefix: list[int], token: int) -> float | None:
    """Return the log-probability of a token after others."""
    entries = (chosen(server, prefix, token).get("logprobs") or {}).get("content", ())
    return next((entry["logprob"] for entry in entries if entry["id"] == token), None)


def ends(server: Any, token: int) -> bool:
    """Tell whether a generation ends at a token."""
    return bool(chosen(server, [0], token)["finish_reason"] == "stop")


def scored(server: Any, ids: list[int], start: int) -> list[float | None]:
    """Return the log-probabilities of all tokens but the first, from the one with the number `start` on."""
    return [log_prob(server, ids[:n], ids[n]) if n >= start else None for n in range(1, len(ids))]


def tokenized(server: Any, text: str) -> list[int]:
    """Return the tokens of a prompt, as llama.cpp's server makes them."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    address = f"{server.listening_address}/tokenize"
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as answer:
        tokens: list[int] = json.loads(answer.read())["tokens"]
    return tokens


def main() -> None:
    """Answer the request."""
    request = json.load(sys.stdin)
    sequences, texts, stops = (request.get(name, []) for name in ("sequences", "texts", "stops"))
    length = max((len(ids) + 8 for ids, _ in sequences), default=0)
    server = serve(request["model"], request["adapter"], length, request["threads"])
    answer = {
        "log_probs": [scored(server, ids, start) for ids, start in sequences],
        "tokens": [tokenized(server, text) for text in texts],
        "ends": [token for token in stops if ends(server, token)],
    }
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()
    os._exit(0)  # without the end of the server, which may abort


if __name__ == "__main__":
    main()
