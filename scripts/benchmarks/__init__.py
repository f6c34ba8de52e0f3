"""litlora, PEFT with transformers, and litgpt at the same work; `scripts/benchmark` runs it."""
