"""The Triton kernels against the plain operations on random shapes: in triton's interpreter on a CPU, and on CUDA.

Every place of the pool that no request uses holds NaN, and so does every place behind the last token of a KV block. So
a key too many shows in the result.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")
pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 alone: pip install -e '.[dev]' there")

from torch import Tensor  # noqa: E402

from hw.elastic import ops  # noqa: E402
from hw.elastic.kernels import attention  # noqa: E402
from hw.elastic.kernels.launch import INTERPRETED, LAUNCHES  # noqa: E402
from hw.elastic.quantize import quantize  # noqa: E402
from sim.paths import REPOSITORY  # noqa: E402
from tests.sample import quick  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


SEEDS_ON_CUDA = (*range(5), 100)
"""A GPU takes a second to compile the kernels of each, and the interpreter tests the others."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs its kernels."""
    interpreted = bool(INTERPRETED.value)
    if request.param == "cpu" and not interpreted:
        pytest.skip("kernels run on a CPU only in triton's interpreter: set TRITON_INTERPRET=1")
    if request.param == "cuda" and (interpreted or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, and TRITON_INTERPRET unset")
    seed = request.node.callspec.params.get("seed", 0)
    if request.param == "cuda" and seed not in SEEDS_ON_CUDA:
        pytest.skip("the interpreter tests this seed")
    return str(request.param)


def close(found: Tensor, expected: Tensor) -> None:
    """Compare with what FP32 gives, as exactly as the type of the result allows."""
    bound = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.to(torch.float32), expected.to(torch.float32), rtol=bound, atol=bound)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(torch.float32) for tensor in tensors]


def normal(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    """Random values; the generator of the CPU makes them, so that every device sees the same."""
    return torch.randn(shape).to(device, dtype)


@dataclass
class Paged:
    """Requests of random contexts in a pool of shuffled KV blocks."""

    kv: Tensor
    table: Tensor
    query: Tensor
    heads: int
    scale: float


def paged(
    rng: random.Random, held: list[int], rows: int, *, group: int, d: int, p: int, dtype: torch.dtype, device: str
) -> Paged:
    """Return a pool in which request i fills ``held[i]`` places, and the queries of ``rows`` tokens.

    The queries are a view of a wider product, as they are in a model that computes q, k and v as one.
    """
    kv_heads = rng.choice([1, 2])
    heads = group * kv_heads
    needed = [-(-count // p) for count in held]
    numbers = list(range(sum(needed) + 3))
    rng.shuffle(numbers)
    kv = torch.full((len(numbers), 2, p, kv_heads, d), float("nan"))
    table = torch.full((len(held), max(needed, default=0) + rng.choice([0, 1, 5])), 1 << 30, dtype=torch.int32)
    for request, (count, blocks) in enumerate(zip(held, needed, strict=True)):
        own = [numbers.pop() for _ in range(blocks)]
        table[request, :blocks] = torch.tensor(own, dtype=torch.int32)
        values = torch.randn(2, blocks * p, kv_heads, d)
        values[:, count:] = float("nan")
        kv[own] = values.view(2, blocks, p, kv_heads, d).transpose(0, 1)
    product = torch.randn(rows, (heads + 2 * kv_heads) * d).to(device, dtype)
    query = product[:, : heads * d].view(rows, heads, d)
    return Paged(kv.to(device, dtype), table.to(device), query, heads, d**-0.5)


def contexts(rng: random.Random, count: int, longest: int) -> list[int]:
    """Random contexts, of which short and long ones are as likely."""
    return [min(longest, int(2 ** rng.uniform(0, longest.bit_length()))) for _ in range(count)]


def ints(values: list[int], device: str) -> Tensor:
    """An int32 tensor that starts at no multiple of 16 bytes, like a view of one buffer for a batch."""
    return torch.tensor([0, *values], dtype=torch.int32, device=device)[1:]


def decode(seed: int, device: str, longest: int) -> None:
    """Compare decode on one random batch."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    group, d = rng.choice([1, 3, 4, 8]), rng.choice([64, 80, 96, 128])
    p, dtype = rng.choice([16, 16, 1, 8, 24, 64]), rng.choice(DTYPES)
    tokens = [
        *contexts(rng, rng.choice([1, 2, 4] if longest < 1000 else [1, 2]), longest),
        rng.choice([0, 1, p, longest]),
    ]
    first, last = [0] * len(tokens), [0] * len(tokens)
    for request in range(len(tokens)):
        if rng.random() < 0.4:
            first[request], last[request] = rng.choice([0, 1, 4, 300]), rng.choice([1, 7, 100, 1 << 30])
    kept = [min(count, head + tail) if tail else count for count, head, tail in zip(tokens, first, last, strict=True)]
    case = paged(rng, kept, len(tokens), group=group, d=d, p=p, dtype=dtype, device=device)
    window = rng.choice([0, 0, 1, 50, 1000])
    arguments = case.table, ints(tokens, device), ints(first, device), ints(last, device)
    with ops.use_kernels():
        found = ops.paged_decode(case.query, case.kv, *arguments, scale=case.scale, window=window)
    query, kv = wide(case.query, case.kv)
    close(found, ops.paged_decode_reference(query, kv, *arguments, scale=case.scale, window=window))


@pytest.mark.parametrize("seed", quick(range(30), 12))
def test_decode_attends_as_the_plain_form_does(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "multiprocessors", lambda device: random.Random(seed).choice([1, 8]))
    decode(seed, device, longest=700)


@pytest.mark.parametrize("seed", quick([100, 101, 102, 103], 2))
def test_decode_of_contexts_up_to_8192_tokens(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 2)
    decode(seed, device, longest=8192)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 260))
def test_decode_of_many_random_batches(seed: int, device: str) -> None:
    decode(seed, device, longest=8192)


def prefill(seed: int, device: str, longest: int) -> None:
    """Compare prefill on one random batch of chunks, with rows of decodes before them and padding behind."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    group, d = rng.choice([1, 3, 4, 8]), rng.choice([64, 80, 96, 128])
    p, dtype = rng.choice([16, 16, 1, 8, 24, 64]), rng.choice(DTYPES)
    count = rng.choice([1, 2, 5])
    new = [rng.choice([0, 1, 17, 60, longest // 8]) for _ in range(count)]
    prefix = [rng.choice([0, 0, 1, 2 * p, *contexts(rng, 1, longest)]) for _ in range(count)]
    decodes, padding = rng.choice([0, 3]), rng.choice([0, 2])
    starts = [decodes]
    for more in new:
        starts.append(starts[-1] + more)
    held = [before + more for before, more in zip(prefix, new, strict=True)]
    case = paged(rng, held, starts[-1] + padding, group=group, d=d, p=p, dtype=dtype, device=device)
    window = rng.choice([0, 0, 1, 50, 1000])
    arguments = case.table, ints(starts, device), ints(prefix, device)
    mark = torch.full((len(case.query), case.heads, d), 7.0, dtype=dtype, device=device)
    with ops.use_kernels():
        ops.paged_prefill(case.query, case.kv, *arguments, scale=case.scale, window=window, out=mark)
    query, kv = wide(case.query, case.kv)
    expected = ops.paged_prefill_reference(query, kv, *arguments, scale=case.scale, window=window)
    chunks = slice(starts[0], starts[-1])
    close(mark[chunks], expected[chunks])
    assert (mark[: starts[0]] == 7).all()
    assert (mark[starts[-1] :] == 7).all()


@pytest.mark.parametrize("seed", quick(range(30), 12))
def test_prefill_attends_as_the_plain_form_does(seed: int, device: str) -> None:
    prefill(seed, device, longest=300)


@pytest.mark.parametrize("seed", quick([100, 101], 1))
def test_prefill_behind_prefixes_of_up_to_8192_tokens(seed: int, device: str) -> None:
    prefill(seed, device, longest=1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 240))
def test_prefill_of_many_random_batches(seed: int, device: str) -> None:
    prefill(seed, device, longest=8192)


@pytest.mark.parametrize("seed", quick(range(24), 12))
def test_rotation_and_storing_are_those_of_the_plain_form(seed: int, device: str) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, d, p = rng.choice(DTYPES), rng.choice([64, 80, 96, 128]), rng.choice([1, 16, 24])
    heads, kv_heads = rng.choice([(2, 2), (9, 3), (8, 2), (8, 1), (13, 1)])
    n = rng.choice([1, 2, 9])
    product = normal(n, (heads + 2 * kv_heads) * d + 16, device=device, dtype=dtype)
    qkv = product[:, 16:]
    d_rot = rng.choice([d, d, d // 2, d // 4 * 2, 0])
    cos, sin = (normal(n, d_rot, device=device, dtype=dtype) for _ in range(2)) if d_rot else (None, None)
    norms = [normal(d, device=device, dtype=dtype) for _ in range(2)] if rng.random() < 0.5 else [None, None]
    slots = torch.tensor([rng.choice([-1, 0]) * 10**6 + i for i in rng.sample(range(6 * p + n), n)]).to(device)
    settings = {"heads": heads, "kv_heads": kv_heads, "eps": 1e-5, "offset": rng.choice([0.0, 1.0])}
    kv = torch.full((7 + n, 2, p, kv_heads, d), 7.0, dtype=dtype, device=device)
    expected_kv = kv.to(torch.float32)
    with ops.use_kernels():
        found = ops.rope_and_store(qkv, cos, sin, kv, slots, q_norm=norms[0], k_norm=norms[1], **settings)
    turns = (None, None) if cos is None else wide(cos, sin)
    q_norm, k_norm = (None, None) if norms[0] is None else wide(*norms)
    expected = ops.rope_and_store_reference(
        qkv.to(torch.float32), *turns, expected_kv, slots, q_norm=q_norm, k_norm=k_norm, **settings
    )
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    close(kv, expected_kv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "e"), [(1, 64), (5, 576), (3, 100), (2, 4096)])
def test_norms_round_like_the_plain_form(n: int, e: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(n)
    x = normal(n, 2 * e, device=device, dtype=dtype)[:, e:]
    residual, weight = normal(n, e, device=device, dtype=dtype), normal(e, device=device, dtype=dtype)
    for offset in (0.0, 1.0):
        with ops.use_kernels():
            alone = ops.rms_norm(x, weight, 1e-5, offset)
            normed, total = ops.add_rms_norm(x, residual, weight, 1e-5, offset)
        close(alone, ops.rms_norm_reference(x, weight, 1e-5, offset))
        close(normed, ops.rms_norm_reference(residual + x, weight, 1e-5, offset))
        close(total, residual + x)  # the interpreter cuts FP32 off where BF16 rounds
        if dtype != torch.bfloat16:
            assert torch.equal(total, residual + x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(("n", "f"), [(1, 64), (3, 1536), (2, 1100)])
def test_gated_activations(n: int, f: int, activation: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(n)
    both = normal(n, 2 * f, device=device, dtype=dtype) * 8
    with ops.use_kernels():
        found = ops.gated(both, activation)
    close(found / 8, ops.gated_reference(both.to(torch.float32), activation) / 8)


@pytest.mark.parametrize(("bits", "half"), [(8, False), (8, True), (4, False)])
@pytest.mark.parametrize(("o", "i"), [(64, 256), (8, 128), (3, 130), (5, 7), (1, 1), (33, 1500), (70, 257)])
def test_products_with_quantized_weights(o: int, i: int, bits: int, half: bool, device: str) -> None:
    rng = random.Random(o)
    torch.manual_seed(o)
    weight = quantize((torch.randn(o, i) * i**-0.5).to(device), bits).read(half=half)
    for n in (0, 1, rng.choice([2, 16]), rng.choice([17, 33, 65, 130])):
        dtype = rng.choice(DTYPES)
        x = normal(n, i, device=device, dtype=dtype)
        bias = normal(o, device=device, dtype=dtype) if rng.random() < 0.5 else None
        with ops.use_kernels():
            found = ops.quantized_linear(x, weight, bias)
        assert found.dtype == dtype
        exact = x.to(torch.float64) @ weight.dequantize(torch.float32).to(torch.float64).T
        close(found, exact if bias is None else exact + bias)


def test_a_product_keeps_leading_dimensions_and_takes_strided_rows(device: str) -> None:
    weight = quantize(torch.randn(10, 256).to(device), 4)
    x = normal(2, 3, 512, device=device, dtype=torch.float32)[..., 256:]
    with ops.use_kernels():
        found = ops.quantized_linear(x, weight)
    assert found.shape == (2, 3, 10)
    torch.testing.assert_close(found, x @ weight.dequantize(torch.float32).T, rtol=1e-4, atol=1e-4)


def test_a_pool_of_more_than_two_to_the_31_elements(device: str) -> None:
    """Offsets in 32 bits would wrap around. The pool is not written, so a CPU backs only the blocks that are used."""
    torch.manual_seed(0)
    heads, kv_heads, d, p = 2, 2, 64, 64
    block = 2 * p * kv_heads * d
    blocks = (1 << 31) // block + 5
    kv = torch.empty((blocks, 2, p, kv_heads, d), dtype=torch.float16, device=device)
    table = torch.tensor([[blocks - 1, 3], [blocks - 2, blocks - 4]], dtype=torch.int32, device=device)
    kv[table.to(torch.int64)] = normal(2, 2, 2, p, kv_heads, d, device=device, dtype=torch.float16)
    slots = torch.tensor([3 * p + 35, (blocks - 4) * p + 6], device=device)
    qkv = normal(2, (heads + 2 * kv_heads) * d, device=device, dtype=torch.float16)
    tokens, none = ints([100, 71], device), ints([0, 0], device)
    with ops.use_kernels():
        query, key, value = ops.rope_and_store(qkv, None, None, kv, slots, heads=heads, kv_heads=kv_heads)
        decoded = ops.paged_decode(query, kv, table, tokens, none, none, scale=0.1)
        filled = ops.paged_prefill(query, kv, table, ints([0, 1, 2], device), tokens - 1, scale=0.1)
    stored = kv[slots // p, :, slots % p]
    assert torch.equal(stored, torch.stack((key, value), dim=1))
    expected = ops.paged_decode_reference(query, kv, table, tokens, none, none, scale=0.1)
    close(decoded, expected)
    close(filled, expected)


def test_each_operation_is_one_launch_and_decode_at_most_two(device: str) -> None:
    case = paged(random.Random(0), [300, 20], 2, group=4, d=64, p=16, dtype=torch.float32, device=device)
    none = ints([0, 0], device)
    x = normal(2, 64, device=device, dtype=torch.float32)
    weight = quantize(torch.randn(8, 64).to(device), 4)
    before = LAUNCHES.copy()
    with ops.use_kernels():
        ops.paged_decode(case.query, case.kv, case.table, ints([300, 20], device), none, none, scale=1.0)
        ops.paged_prefill(case.query, case.kv, case.table, ints([0, 1, 2], device), ints([299, 19], device), scale=1.0)
        ops.add_rms_norm(x, x, x[0], 1e-5)
        ops.gated(x, "silu")
        ops.quantized_linear(x, weight)
        ops.quantized_linear(x[:1], weight)
    assert LAUNCHES - before == {
        "_decode_kernel": 1,
        "_combine_kernel": 1,
        "_prefill_kernel": 1,
        "_rms_norm_kernel": 1,
        "_gated_kernel": 1,
        "_tile_kernel": 1,
        "_row_kernel": 1,
    }


def test_the_launch_of_a_decode_depends_on_the_shape_of_the_table_alone(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []
    record = lambda kernel, grid, *arguments, **constants: starts.append((grid, constants))  # noqa: E731
    monkeypatch.setattr(attention, "launch", record)
    case = paged(random.Random(0), [300, 20], 2, group=4, d=64, p=16, dtype=torch.float32, device=device)
    none = ints([0, 0], device)
    with ops.use_kernels():
        for tokens in ([300, 20], [1, 0], [17, 256]):
            ops.paged_decode(case.query, case.kv, case.table, ints(tokens, device), none, none, scale=1.0)
    assert len(starts) == 6
    assert starts[:2] == starts[2:4] == starts[4:]


def test_meta_tensors_are_counted_and_start_nothing() -> None:
    before = LAUNCHES.copy()
    found = ops.gated(torch.empty(4, 256, device="meta"), "silu")
    assert found.shape == (4, 128)
    assert found.is_meta
    assert LAUNCHES - before == {"_gated_kernel": 1}


def compile_for(cache: Path, *arguments: str) -> None:
    """Compile kernels in another process, because the interpreter cannot be switched off in this one."""
    command = [sys.executable, "-m", "tests.hw.elastic.compile_kernels", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_compiles_for_a_gpu_fits_its_shared_memory_and_has_few_variants(tmp_path: Path) -> None:
    compile_for(tmp_path, "few", "90")


@pytest.mark.slow
def test_all_shapes_compile_for_four_generations_of_gpus(tmp_path: Path) -> None:
    compile_for(tmp_path, "80", "86", "90", "120")
