"""Tuned constants of the CPU code: what each means, and where it was measured.

All were measured on two cores of a Xeon with AVX-512 and AMX (bfloat16), torch 2.13, between 2026-11-22 and 2026-11-29.
`scripts/cpu_paths.py` measures what the code that they belong to gains; docs/cpu.md has the figures.
"""

# Products

SLICE_ROWS = 2048
"""Rows of a bfloat16 weight that are cast to float32 at once, where bfloat16 products are slow."""
STORED_SLICE_ROWS = 512
"""Rows of a quantized weight that are dequantized at once, if each exists in several dtypes."""
STORED_SLICE_VALUES = 2**20
"""Values of a quantized weight that are dequantized at once, if each exists in one dtype: fewer, larger products."""
LONG_OUTPUTS, LONG_SLICE = 2**14, 512
"""From how many outputs on a float32 product is computed in slices, and the outputs of a slice, which stay in cache."""
DEQUANTIZED_VALUES = 2**18
"""Values of a weight of a GGUF file that are computed at once, in several steps: they stay in the cache."""
COMPILED_SUMS = 4
"""Outputs of a compiled product whose sums are interleaved, so that an addition does not wait for the one before."""

# Attention

BLOCK = 128
"""Queries whose scores exist at once: they stay in the cache, and few masked scores are computed."""
RETAINED_KEYS = 256
"""Keys of a block, at most, for its probabilities to be saved for the backward pass instead of computed again."""

# oneDNN's kernel cache: bfloat16 only

PAD_MULTIPLE = 16
"""The rows of a product are padded to a multiple of this, as each shape costs memory."""
PAD_QUERIES, PAD_KEYS = 32, 64
"""A block's queries and keys are padded to multiples of these in the backward pass of attention."""

# Loss

CACHED_LOGITS = 2**20
"""Logits that become float32 probabilities at once: they stay in the cache."""

# Decoding

STRIPE_OUTPUTS, FEWEST_OUTPUTS = 192, 32
"""Outputs of a bfloat16 weight, at most and at least, that a stripe holds next to each other."""
HALF_ROWS = 2**14
"""Rows that FBGEMM packs at once: where there are many more, each takes it several times as long."""
REPACK_TOKENS = 128
"""From how many tokens on repacking the weights for decoding takes less time than it saves."""

# Memory

FRAGMENTATION = 0.27
"""Free bytes of glibc's allocator while the activations are in use, as a share of them."""
LEAST_FRAGMENTATION = 20
"""The same at least, in MLP values per token, for where few activations are saved."""

# Micro-batches

MICRO_BATCH_TOKENS = 50
"""Tokens whose time a micro-batch takes beside that of its own: launching its operations, and reading all weights."""
CORE_SCALING = 0.9
"""A micro-batch on n cores is n to this power times as fast as on one."""
