"""Every way to compute attention gives the same result as PyTorch over gathered KV, and names what it lacks."""

from __future__ import annotations

import importlib.util
import random
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the real model needs torch: pip install -e '.[hw]'")

from hw.elastic.attention import Attention, Kernels, Sdpa  # noqa: E402
from hw.elastic.attention_choice import ATTENTIONS, find_attention  # noqa: E402
from hw.elastic.attention_packages import FlashAttn, FlashInfer  # noqa: E402
from hw.elastic.device import Cpu  # noqa: E402
from hw.elastic.kv_storage import ArenaStorage  # noqa: E402
from hw.elastic.paged_attention import Packed, PagedBatch  # noqa: E402
from hw.elastic.paged_kv import KVArena  # noqa: E402
from sim.cost.kv_format import KVFormat  # noqa: E402
from sim.cost.plan import KV_KEEP_ALL, KVKeep  # noqa: E402
from sim.engine.block_table import BlockTable  # noqa: E402
from sim.engine.kv_pool import KVPool  # noqa: E402
from sim.errors import ConfigError  # noqa: E402
from tests.hw import fake_attention  # noqa: E402

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 5
CPU = torch.device("cpu")


class Case:
    """Random requests over a pool of random keys: layers that some requests skip, windows, and kept tokens."""

    def __init__(self, seed: int, block_tokens: int, *, windows: bool, keeps: bool) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.arena = KVArena(
            Cpu(), capacity=600, block_tokens=block_tokens, heads=KV_HEADS, head_dim=DIM, dtype=torch.float32
        )
        pool = KVPool(600, ArenaStorage(self.arena))
        pool.take(rng.randint(1, 40))
        self.arena.kv.normal_()
        self.windows = [rng.choice([None, 5, 40]) if windows else None for _ in range(LAYERS)]
        self.decodes, self.chunks = [], []
        for _ in range(rng.randint(1, 5)):
            kv_keep = None
            if keeps and rng.random() < 0.7:
                kv_keep = tuple(
                    rng.choice(
                        [KV_KEEP_ALL, KVKeep(first_tokens=2, last_tokens=6), KVKeep(first_tokens=0, last_tokens=9)]
                    )
                    for _ in range(LAYERS)
                )
            tokens = rng.randint(1, 4 * block_tokens)
            self.decodes.append(Packed(self._table(rng, pool, tokens, kv_keep), [0], tokens - 1))
        for _ in range(rng.randint(0, 2)):
            before, new = rng.choice([0, rng.randint(1, 2 * block_tokens)]), rng.randint(1, block_tokens + 3)
            self.chunks.append(Packed(self._table(rng, pool, before + new, None), [0] * new, before))

    def _table(self, rng: random.Random, pool: KVPool, tokens: int, kv_keep: Any) -> BlockTable:
        layers = range(LAYERS) if rng.random() < 0.6 else rng.sample(range(LAYERS), 3)
        size = self.arena.block_tokens
        formats = None if kv_keep is None else tuple(KVFormat(keep, 16, size, 1, 1) for keep in kv_keep)
        table = BlockTable(mha=frozenset(layers), block_tokens=size, formats=formats)
        table.hold(pool, tokens)
        return table

    def attend(self, attention: Attention) -> list[Any]:
        """Return the attention of every layer."""
        torch.manual_seed(1)
        batch = PagedBatch(self.arena, self.decodes, self.chunks, self.windows, attention=attention)
        found = []
        for layer in range(LAYERS):
            rows = batch.rows(layer)
            count = len(batch.tokens) if rows is None else rows.numel()
            qkv = torch.randn(count, (HEADS + 2 * KV_HEADS) * DIM)
            if count:
                shape = {"heads": HEADS, "kv_heads": KV_HEADS, "scale": 0.3}
                found.append(batch.attend(layer, qkv, None, **shape, q_norm=None, k_norm=None, eps=0.0, offset=0.0))
        return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["triton", "flash_attn", "flashinfer", "flashinfer that copies"])
def test_every_way_gives_what_pytorch_gives(seed: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_attention._Wrapper, "copies", kind.endswith("copies"))
    size = 256 if kind == "flash_attn" else 4
    case = Case(seed, size, windows=seed % 3 == 1, keeps=seed % 2 == 1)
    made = {"triton": Kernels(), "flash_attn": FlashAttn(fake_attention)}.get(kind)
    attention = made or FlashInfer(fake_attention, CPU)
    expected = case.attend(Sdpa())
    for found, want in zip(case.attend(attention), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("copies", "plans"), [(False, 1), (True, 5)])
def test_flashinfer_plans_once_for_all_layers_unless_it_copies_block_numbers(
    copies: bool, plans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_attention._Wrapper, "copies", copies)
    monkeypatch.setattr(fake_attention.BatchDecodeWithPagedKVCacheWrapper, "plans", 0)
    case = Case(3, 4, windows=False, keeps=False)
    case.chunks = []
    for packed in case.decodes:
        packed.table.mha = frozenset(range(LAYERS))
        packed.table.hold(KVPool(600, ArenaStorage(case.arena)), packed.start + 1)
    case.attend(FlashInfer(fake_attention, CPU))
    assert fake_attention.BatchDecodeWithPagedKVCacheWrapper.plans == plans


# --- hw.attention


def found(name: str, device: str = "cuda", **more: Any) -> Attention:
    settings = {"head_dim": 128, "dtype": torch.bfloat16, "block_tokens": 16, **more}
    return find_attention(name, torch.device(device), **settings)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that are installed; a test may change the set."""
    names = {"flashinfer", "flash_attn", "triton"}
    import hw.elastic.attention_choice as choice

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if name in names else None)
    monkeypatch.setattr(choice, "_package", lambda name: fake_attention)
    monkeypatch.setattr(choice, "_runs_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(choice.ops, "have_triton", lambda: "triton" in names)
    return names


def test_auto_takes_the_first_that_is_available(installed: set[str]) -> None:
    assert found("auto").name == "flashinfer"
    assert found("auto", head_dim=96).name == "triton"
    assert found("auto", head_dim=96, block_tokens=256).name == "flash_attn"
    assert found("auto", dtype=torch.float32).name == "triton"
    assert found("auto", "cpu").name == "sdpa"
    installed.clear()
    assert found("auto").name == "sdpa"
    for name in ("sdpa", "triton", "flashinfer"):
        installed.add(name)
        assert found(name).name == name


@pytest.mark.parametrize(
    ("name", "device", "more", "says"),
    [
        ("flash", "cuda", {}, "flash_attn"),
        ("fastest", "cuda", {}, "allowed: auto, flash_attn, flashinfer, sdpa, triton"),
        ("triton", "cpu", {}, "do not run on cpu; available here: auto, sdpa"),
        ("flashinfer", "cpu", {}, "does not run on cpu"),
        ("flashinfer", "cuda", {"head_dim": 96}, "no kernel for a head_dim of 96; available here: auto, triton, sdpa"),
        ("flashinfer", "cuda", {"dtype": torch.float32}, "does not compute in float32"),
        ("flash_attn", "cuda", {}, "engine.kv_block_tokens to be a multiple of 256, not 16"),
        ("flash_attn", "cuda", {"head_dim": 512, "block_tokens": 256}, "no kernel for a head_dim of 512"),
    ],
)
def test_a_way_that_is_not_there_is_one_line(
    installed: set[str], name: str, device: str, more: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        found(name, device, **more)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["flashinfer", "flash_attn", "triton"])
def test_a_package_that_is_not_installed_is_named(installed: set[str], name: str) -> None:
    installed.discard(name)
    with pytest.raises(ConfigError, match=f"the package {name} is not installed; available here: auto"):
        found(name, block_tokens=256)
    assert len(ATTENTIONS) == 5
