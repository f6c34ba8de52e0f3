import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from litlora.cpu import attention, onednn
from litlora.cpu.attention import BLOCK, RETAINED_KEYS
from litlora.nn import attention as nn_attention
from litlora.nn import cuda_backend
from litlora.nn.attention import attend, sdpa_per_sequence, varlen_flash_attention
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.backend import CPU, CUDA, backend
from litlora.nn.backend_interface import AttentionShape
from litlora.nn.rope import rotate, turns

LENGTHS = [BLOCK + 37, 1, 2 * BLOCK, 20]
APART = [(0, length) for length in LENGTHS]
SHARED = [(0, BLOCK + 37), (BLOCK + 11, 1), (BLOCK + 12, 2 * BLOCK), (3, 20)]


def problem(
    n_head: int, n_kv: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", width: int = 16
) -> list[torch.Tensor]:
    """Return queries, keys, values and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), n, width) for n in (n_head, n_kv, n_kv, n_head)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def spec(window: int | None, softcap: float | None = None, scale: float = 0.3) -> AttentionSpec:
    """Return a layer's attention, whose scale is not the usual one of the heads here."""
    return AttentionSpec(window, scale, softcap)


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: list[tuple[int, int]], spec: AttentionSpec
) -> torch.Tensor:
    """Return the attention of all positions under one mask that keeps the sequences apart, but for what they share."""
    window = spec.window
    mask, start, path = torch.zeros(len(q), len(q), dtype=torch.bool), 0, []
    for shared, own in spans:
        path = [*path[:shared], *range(start, start + own)]
        for position, row in enumerate(path[shared:], start=shared):
            mask[row, path[max(0, position + 1 - (window or len(path))) : position + 1]] = True
        start += own
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
    scores = q @ k.mT * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def outcome(
    attention, tensors: list[torch.Tensor], spec: AttentionSpec, spans: list[tuple[int, int]] = APART
) -> list[torch.Tensor]:
    *inputs, gradient = tensors
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = attention(*leaves, spans, spec)
    y.backward(gradient)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def by_backend(q: torch.Tensor, *rest: object) -> torch.Tensor:
    return backend(q.device).varlen_attention(q, *rest)


SPECS = [
    spec(None),
    spec(1),
    spec(50),
    spec(BLOCK),
    spec(3 * BLOCK),
    spec(None, 2.0),
    spec(50, 0.7),
    spec(None, 9.0, 2),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("n_head", "n_kv"), [(4, 4), (6, 2), (3, 1)])
def test_attention_and_gradients_equal_masked_float64(n_head, n_kv, spec, device):
    tensors = problem(n_head, n_kv, device=device)
    exact = outcome(plain, [t.double().cpu() for t in tensors], spec)
    for ours, reference in zip(outcome(by_backend, tensors, spec), exact, strict=True):
        torch.testing.assert_close(ours.double().cpu(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("n_head", "n_kv"), [(4, 4), (6, 2)])
def test_gradients_of_shared_prefixes(n_head, n_kv, spec):
    tensors = problem(n_head, n_kv)
    exact = outcome(plain, [t.double() for t in tensors], spec, SHARED)
    for ours, reference in zip(outcome(CPU.varlen_attention, tensors, spec, SHARED), exact, strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("width", [16, 20])
def test_bfloat16_on_cuda_deviates_by_its_rounding(window, width):
    tensors = [t[..., :1].expand(-1, -1, width) + t.repeat(1, 1, 2)[..., :width] for t in problem(6, 2)]
    tensors = [t.to("cuda", torch.bfloat16) for t in tensors]
    exact = outcome(plain, [t.double().cpu() for t in tensors], spec(window))
    for ours, reference in zip(outcome(by_backend, tensors, spec(window)), exact, strict=True):
        assert (ours.double().cpu() - reference).norm() <= 2**-6 * reference.norm() + 1e-3


def test_bfloat16_is_rounded_once_without_bf16_matmul(monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)
    tensors = problem(6, 2, torch.bfloat16)
    exact = outcome(CPU.varlen_attention, [t.float() for t in tensors], spec(None))
    for ours, reference in zip(outcome(CPU.varlen_attention, tensors, spec(None)), exact, strict=True):
        assert torch.equal(ours, reference.bfloat16())


@pytest.mark.parametrize("spans", [APART, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("spec", [spec(None, None, 0.25), spec(50), spec(50, 2.0)], ids=str)
@pytest.mark.parametrize("width", [16, 24])
def test_bf16_matmul_deviates_by_its_rounding(width, spec, spans, monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", True)
    tensors = problem(6, 2, torch.bfloat16, width=width)
    exact, actual = (
        outcome(CPU.varlen_attention, some, spec, spans) for some in ([t.float() for t in tensors], tensors)
    )
    assert torch.equal(actual[0], exact[0].bfloat16())  # only gradients are of such products
    for ours, reference in zip(actual, exact, strict=True):
        deviation = (ours.float() - reference).norm() / reference.norm()
        assert deviation < 2**-7  # twice the step from one bfloat16 number to the next


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_recomputed_probabilities_equal_saved_ones(window, dtype, monkeypatch):
    tensors, outcomes = problem(6, 2, dtype), []
    for most in (RETAINED_KEYS, BLOCK + 20, 0):
        monkeypatch.setattr(attention, "RETAINED_KEYS", most)
        outcomes.append(outcome(CPU.varlen_attention, tensors, spec(window), SHARED))
    for others in outcomes[1:]:
        assert all(map(torch.equal, others, outcomes[0]))


@pytest.mark.parametrize("spec", [spec(None), spec(50), spec(None, 2.0)], ids=str)
def test_saved_memory_is_linear_in_the_length(spec):
    def saved(length: int) -> int:
        values: list[torch.Tensor] = []
        leaves = [torch.randn(length, heads, 16, requires_grad=True) for heads in (6, 2, 2)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: values.append(t) or t, lambda t: t):
            CPU.varlen_attention(*leaves, [(0, length)], spec).sum().backward()
        return sum(t.numel() for t in values)

    first, step = saved(2 * RETAINED_KEYS), saved(3 * RETAINED_KEYS) - saved(2 * RETAINED_KEYS)
    assert first <= 2 * RETAINED_KEYS * (6 * RETAINED_KEYS + (6 + 2 + 2) * 16)
    assert step == saved(4 * RETAINED_KEYS) - saved(3 * RETAINED_KEYS)


@pytest.mark.parametrize("spec", [spec(None), spec(1), spec(50), spec(None, 2.0), spec(50, 0.7)], ids=str)
@pytest.mark.parametrize(("n_head", "n_kv"), [(4, 4), (6, 2)])
def test_sdpa_per_sequence_equals_float64(n_head, n_kv, spec):
    """What a GPU without FlashAttention computes, or where there is a softcap."""

    def per_sequence(q, k, v, spans, spec):
        return sdpa_per_sequence(q, k, v, [own for _, own in spans], spec)

    tensors = problem(n_head, n_kv)
    exact = outcome(plain, [t.double() for t in tensors], spec)
    for ours, reference in zip(outcome(per_sequence, tensors, spec), exact, strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_varlen_attention_is_torch_s_public_one(window, monkeypatch):
    """Run torch's own function on tensors without data, which checks arguments, output and the backward pass."""
    monkeypatch.setattr(cuda_backend, "_has_flash_attention", lambda *_: True)
    monkeypatch.setattr(nn_attention, "_bounds", nn_attention._bounds.__wrapped__)  # a cache of tensors without data
    calls, public = [], nn_attention.public_varlen_attention()
    if public is None:
        pytest.skip("this torch has no public varlen attention")
    count = lambda *a, **k: calls.append(k) or public(*a, **k)  # noqa: E731
    monkeypatch.setattr(nn_attention, "public_varlen_attention", lambda: count)
    with FakeTensorMode():
        q, k, v, gradient = problem(6, 2, torch.bfloat16)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        y = CUDA.varlen_attention(*leaves, APART, spec(window))
        y.backward(gradient)
    assert calls == [{"window_size": (-1 if window is None else window - 1, 0), "enable_gqa": True, "scale": 0.3}]
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("public", [True, False])
def test_varlen_attention_has_the_arguments_of_the_sequences(window, public, monkeypatch):
    """FlashAttention's kernels, which need a GPU, are replaced by attention under a mask, as they document it."""

    def kernel(q, k, v, bounds, longest, window, scale):
        lengths = bounds.diff().tolist()
        assert longest == max(lengths)
        return plain(q, k, v, [(0, length) for length in lengths], AttentionSpec(window, scale))

    def varlen_attn(q, k, v, starts, ends, longest, longest_keys, *, window_size, enable_gqa, scale):
        assert enable_gqa
        assert torch.equal(starts, ends)
        assert longest == longest_keys
        assert window_size[1] == 0
        return kernel(q, k, v, starts, longest, None if window_size[0] == -1 else window_size[0] + 1, scale)

    monkeypatch.setattr(nn_attention, "public_varlen_attention", lambda: varlen_attn if public else None)
    monkeypatch.setattr(nn_attention, "flash_attention", kernel)
    q, k, v, _ = problem(6, 2)
    torch.testing.assert_close(
        varlen_flash_attention(q, k, v, tuple(LENGTHS), spec(window)),
        CPU.varlen_attention(q, k, v, APART, spec(window)),
    )


def test_softcap_on_cuda_does_without_flash_attention(monkeypatch):
    """FlashAttention would leave the softcap out."""
    monkeypatch.setattr(cuda_backend, "_has_flash_attention", lambda *_: True)
    tensors = problem(6, 2)
    exact = outcome(plain, [t.double() for t in tensors], spec(50, 2.0))
    for ours, reference in zip(outcome(CUDA.varlen_attention, tensors, spec(50, 2.0)), exact, strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)
    shape = AttentionShape(6, 2, 16, spec(50, 2.0))
    values = sum(t.numel() for t in tensors[:3])
    assert CUDA.attention_saved_bytes(shape, APART, torch.bfloat16) == 2 * values


@pytest.mark.parametrize("spec", [spec(None), spec(7), spec(None, 2.0), spec(7, 2.0)], ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["bf16 matmul", "no bf16 matmul"])
def test_new_tokens_attend_to_the_cache(spec, native, monkeypatch):
    if not native:
        monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)
    q, k, v, _ = (t[:60].transpose(0, 1) for t in problem(6, 2, torch.bfloat16))
    exact = attend(q.double(), k.double(), v.double(), spec=spec)
    masked = plain(*(t.double().transpose(0, 1) for t in (q, k, v)), [(0, 60)], spec).transpose(0, 1)
    torch.testing.assert_close(exact, masked, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_attend_one(q, k, v, spec), exact[:, -1:], atol=1e-6, rtol=1e-6)
    for rows in (1, 5, 60):
        first = max(0, 60 - rows - spec.window + 1) if spec.window else 0
        y = attend(q[:, -rows:], k[:, first:], v[:, first:], spec=spec)
        torch.testing.assert_close(y.double(), exact[:, -rows:], atol=2**-7, rtol=2**-7)


def _attend_one(q, k, v, spec):
    """Attend with the last query, as the compiled decode step does."""
    first = 0 if spec.window is None else k.shape[1] - spec.window
    k, v = (t.double().repeat_interleave(len(q) // len(t), dim=0)[:, first:] for t in (k, v))
    return nn_attention._attend_one_query(q[:, -1:].double(), k, v, spec)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 6])
def test_rotation_preserves_norms_and_passes_gradcheck(dim, interleaved):
    x = torch.randn(9, 3, 8, dtype=torch.float64, requires_grad=True)
    rope = turns(torch.randn(9, dim // 2, dtype=torch.float64), torch.float64, 1.0, interleaved)
    torch.testing.assert_close(rotate(x, rope).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, rope)[..., dim:], x[..., dim:])
    assert torch.autograd.gradcheck(lambda t: rotate(t, rope), x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 6])
def test_compiled_rotation_equals_the_eager_one(dim, interleaved, monkeypatch):
    x = torch.randn(9, 3, 8)
    rope = turns(torch.randn(9, dim // 2), torch.float32, 1.3, interleaved)
    expected = rotate(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rope), expected)
