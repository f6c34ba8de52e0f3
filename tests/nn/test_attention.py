import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from litlora.cpu import attention, onednn
from litlora.cpu.attention import BLOCK, RETAINED_KEYS
from litlora.nn import attention as nn_attention
from litlora.nn import backend as nn_backend
from litlora.nn.attention import attend, sdpa_per_sequence, varlen_flash_attention
from litlora.nn.backend import CPU, CUDA, backend
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


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: list[tuple[int, int]], window: int | None
) -> torch.Tensor:
    """Return the attention of all positions under one mask that keeps the sequences apart, but for what they share."""
    mask, start, path = torch.zeros(len(q), len(q), dtype=torch.bool), 0, []
    for shared, own in spans:
        path = [*path[:shared], *range(start, start + own)]
        for position, row in enumerate(path[shared:], start=shared):
            mask[row, path[max(0, position + 1 - (window or len(path))) : position + 1]] = True
        start += own
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)


def outcome(
    attention, tensors: list[torch.Tensor], window: int | None, spans: list[tuple[int, int]] = APART
) -> list[torch.Tensor]:
    *inputs, gradient = tensors
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = attention(*leaves, spans, window)
    y.backward(gradient)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def by_backend(q: torch.Tensor, *rest: object) -> torch.Tensor:
    return backend(q.device).varlen_attention(q, *rest)


@pytest.mark.parametrize("window", [None, 1, 50, BLOCK, 3 * BLOCK])
@pytest.mark.parametrize(("n_head", "n_kv"), [(4, 4), (6, 2), (3, 1)])
def test_attention_and_gradients_equal_masked_float64(n_head, n_kv, window, device):
    tensors = problem(n_head, n_kv, device=device)
    exact = outcome(plain, [t.double().cpu() for t in tensors], window)
    for ours, reference in zip(outcome(by_backend, tensors, window), exact, strict=True):
        torch.testing.assert_close(ours.double().cpu(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 50, BLOCK, 3 * BLOCK])
@pytest.mark.parametrize(("n_head", "n_kv"), [(4, 4), (6, 2)])
def test_gradients_of_shared_prefixes(n_head, n_kv, window):
    tensors = problem(n_head, n_kv)
    exact = outcome(plain, [t.double() for t in tensors], window, SHARED)
    for ours, reference in zip(outcome(CPU.varlen_attention, tensors, window, SHARED), exact, strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("width", [16, 20])
def test_bfloat16_on_cuda_deviates_by_its_rounding(window, width):
    tensors = [t[..., :1].expand(-1, -1, width) + t.repeat(1, 1, 2)[..., :width] for t in problem(6, 2)]
    tensors = [t.to("cuda", torch.bfloat16) for t in tensors]
    exact = outcome(plain, [t.double().cpu() for t in tensors], window)
    for ours, reference in zip(outcome(by_backend, tensors, window), exact, strict=True):
        assert (ours.double().cpu() - reference).norm() <= 2**-6 * reference.norm() + 1e-3


def test_bfloat16_is_rounded_once_without_bf16_matmul(monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)
    tensors = problem(6, 2, torch.bfloat16)
    exact = outcome(CPU.varlen_attention, [t.float() for t in tensors], None)
    for ours, reference in zip(outcome(CPU.varlen_attention, tensors, None), exact, strict=True):
        assert torch.equal(ours, reference.bfloat16())


@pytest.mark.parametrize("spans", [APART, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("width", [16, 24])  # the root of one is a power of two
def test_bf16_matmul_deviates_by_its_rounding(width, window, spans, monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", True)
    tensors = problem(6, 2, torch.bfloat16, width=width)
    exact, actual = (
        outcome(CPU.varlen_attention, some, window, spans) for some in ([t.float() for t in tensors], tensors)
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
        outcomes.append(outcome(CPU.varlen_attention, tensors, window, SHARED))
    for others in outcomes[1:]:
        assert all(map(torch.equal, others, outcomes[0]))


@pytest.mark.parametrize("window", [None, 50])
def test_saved_memory_is_linear_in_the_length(window):
    def saved(length: int) -> int:
        values: list[torch.Tensor] = []
        leaves = [torch.randn(length, heads, 16, requires_grad=True) for heads in (6, 2, 2)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: values.append(t) or t, lambda t: t):
            CPU.varlen_attention(*leaves, [(0, length)], window).sum().backward()
        return sum(t.numel() for t in values)

    first, step = saved(2 * RETAINED_KEYS), saved(3 * RETAINED_KEYS) - saved(2 * RETAINED_KEYS)
    assert first <= 2 * RETAINED_KEYS * (6 * RETAINED_KEYS + (6 + 2 + 2) * 16)
    assert step == saved(4 * RETAINED_KEYS) - saved(3 * RETAINED_KEYS)


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("n_head", "n_kv"), [(4, 4), (6, 2)])
def test_sdpa_per_sequence_equals_float64(n_head, n_kv, window):
    """What a GPU without FlashAttention computes."""

    def per_sequence(q, k, v, spans, window):
        return sdpa_per_sequence(q, k, v, [own for _, own in spans], window)

    tensors = problem(n_head, n_kv)
    exact = outcome(plain, [t.double() for t in tensors], window)
    for ours, reference in zip(outcome(per_sequence, tensors, window), exact, strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_varlen_attention_is_torch_s_public_one(window, monkeypatch):
    """Run torch's own function on tensors without data, which checks arguments, output and the backward pass."""
    monkeypatch.setattr(nn_backend, "_has_flash_attention", lambda *_: True)
    monkeypatch.setattr(nn_attention, "_bounds", nn_attention._bounds.__wrapped__)  # a cache of tensors without data
    calls, public = [], nn_attention.public_varlen_attention()
    if public is None:
        pytest.skip("this torch has no public varlen attention")
    count = lambda *a, **k: calls.append(k) or public(*a, **k)  # noqa: E731
    monkeypatch.setattr(nn_attention, "public_varlen_attention", lambda: count)
    with FakeTensorMode():
        q, k, v, gradient = problem(6, 2, torch.bfloat16)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        y = CUDA.varlen_attention(*leaves, APART, window)
        y.backward(gradient)
    assert calls == [{"window_size": (-1 if window is None else window - 1, 0), "enable_gqa": True}]
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("public", [True, False])
def test_varlen_attention_has_the_arguments_of_the_sequences(window, public, monkeypatch):
    """FlashAttention's kernels, which need a GPU, are replaced by attention under a mask, as they document it."""

    def kernel(q, k, v, bounds, longest, window):
        lengths = bounds.diff().tolist()
        assert longest == max(lengths)
        return plain(q, k, v, [(0, length) for length in lengths], window)

    def varlen_attn(q, k, v, starts, ends, longest, longest_keys, *, window_size, enable_gqa):
        assert enable_gqa
        assert torch.equal(starts, ends)
        assert longest == longest_keys
        assert window_size[1] == 0
        return kernel(q, k, v, starts, longest, None if window_size[0] == -1 else window_size[0] + 1)

    monkeypatch.setattr(nn_attention, "public_varlen_attention", lambda: varlen_attn if public else None)
    monkeypatch.setattr(nn_attention, "flash_attention", kernel)
    q, k, v, _ = problem(6, 2)
    torch.testing.assert_close(
        varlen_flash_attention(q, k, v, tuple(LENGTHS), window), CPU.varlen_attention(q, k, v, APART, window)
    )


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("native", [True, False], ids=["bf16 matmul", "no bf16 matmul"])
def test_new_tokens_attend_to_the_cache(window, native, monkeypatch):
    if not native:
        monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)
    q, k, v, _ = (t[:60].transpose(0, 1) for t in problem(6, 2, torch.bfloat16))
    exact = attend(q.double(), k.double(), v.double(), window=window)
    for rows in (1, 5, 60):
        y = attend(q[:, -rows:], k, v, window=window)
        torch.testing.assert_close(y.double(), exact[:, -rows:], atol=2**-7, rtol=2**-7)


def test_rotation_preserves_norms_and_passes_gradcheck():
    x = torch.randn(9, 3, 8, dtype=torch.float64, requires_grad=True)
    rope = turns(torch.randn(9, 4, dtype=torch.float64), torch.float64)
    torch.testing.assert_close(rotate(x, rope).norm(dim=-1), x.norm(dim=-1))
    assert torch.autograd.gradcheck(lambda t: rotate(t, rope), x)
