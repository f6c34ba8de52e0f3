"""Fast training and decoding on CPU: attention, matmul, weight layouts, allocator, worker threads, tuned constants.

Only `nn` (through its backend) and the launcher import it. Nothing here is needed on a GPU, and nothing here knows
layers, models or files. docs/cpu.md has what each fast path gains.
"""
