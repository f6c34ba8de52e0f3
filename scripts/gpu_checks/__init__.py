"""litlora on one GPU: its gpu-marked tests, and its speed and memory beside PEFT's; `scripts/gpu_check` runs it."""
