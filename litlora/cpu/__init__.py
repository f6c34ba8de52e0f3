"""How a CPU computes fast: attention, matrix products, weight layouts, allocator, worker threads.

Only `nn` (through its backend) and the launcher import it. Nothing here is needed on a GPU.
"""
