"""How a token is chosen from its logits."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the real engine needs torch: pip install -e '.[hw]'")

from hw.engine.sampling import Draw, Drawn, Sampling  # noqa: E402
from hw.engine.sampling import choose as choose_drawn  # noqa: E402
from sim.cost.memory import SAMPLED_LOGITS  # noqa: E402
from tests.hw.serving import VOCABULARY, hw_engine, requests  # noqa: E402


def sampling(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Sampling:
    return Sampling(temperature=temperature, top_p=top_p, seed=(seed, 0))


def choose(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Return the next token of each row; ``draws`` are the rows to sample."""
    drawn = Drawn(draws)
    return choose_drawn(logits, drawn, [torch.from_numpy(array) for array in drawn.arrays])


def test_without_a_draw_the_likeliest_token_is_taken() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose(logits, []), logits.argmax(-1))


def test_rows_without_a_draw_are_greedy_next_to_rows_with_one() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(1))
    chosen = choose(logits, [Draw(3, sampling(2.0), 5)])
    greedy = logits.argmax(-1)
    assert [i for i in range(7) if chosen[i] != greedy[i]] in ([], [3])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probabilities_say(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf, 0.5]])
    n = 20_000
    draws = [Draw(i, sampling(temperature), i) for i in range(n)]
    counts = np.bincount(choose(logits.expand(n, 5), draws).numpy(), minlength=5) / n
    expected = torch.softmax(logits[0] / temperature, 0).numpy()
    assert counts[3] == 0
    assert np.abs(counts - expected).max() < 4 * math.sqrt(0.25 / n)


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [
        (0.0, {2}),
        (0.4, {2}),
        (0.6, {1, 2}),
        (0.81, {1, 2, 4}),
        (0.96, {0, 1, 2, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_only_the_likeliest_tokens_up_to_top_p_are_chosen(top_p: float, allowed: set[int]) -> None:
    logits = torch.tensor([0.15, 0.3, 0.5, 0.001, 0.2]).log().expand(5000, 5)  # 0.43, 0.26, 0.17, 0.13 and 0.001
    chosen = choose(logits, [Draw(i, sampling(top_p=top_p), i) for i in range(5000)])
    assert set(chosen.tolist()) == allowed


@pytest.mark.parametrize("size", [1, 3, 7])
def test_rows_in_parts_get_the_tokens_of_all_rows_together(size: int) -> None:
    logits = torch.randn(11, 50, generator=torch.Generator().manual_seed(1))
    drawn = Drawn([Draw(row, sampling(1.5, 0.9, seed=row), row) for row in (0, 2, 3, 7, 10)])
    tensors = [torch.from_numpy(array) for array in drawn.arrays]
    parts = [choose_drawn(logits[at : at + size], drawn, tensors, at) for at in range(0, 11, size)]
    assert torch.equal(torch.cat(parts), choose_drawn(logits, drawn, tensors))


def test_a_token_depends_on_its_own_row_seed_and_index_alone() -> None:
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(2))
    draws = [Draw(i, sampling(1.3, 0.5 + i / 128, seed=i), 3 * i) for i in range(64)]
    together = choose(logits, draws)
    for i in range(64):
        assert choose(logits[i : i + 1], [Draw(0, draws[i].sampling, draws[i].index)])[0] == together[i]
    other = choose(logits, [Draw(i, sampling(1.3, 1.0, seed=i + 1000), 3 * i) for i in range(64)])
    assert (other != choose(logits, [Draw(i, sampling(1.3, 1.0, seed=i), 3 * i) for i in range(64)])).any()


def test_a_batch_that_is_too_large_for_one_pass_is_sampled_in_several() -> None:
    vocabulary = SAMPLED_LOGITS // 3
    logits = torch.full((8, vocabulary), -50.0)
    for row in range(8):
        logits[row, 1000 * row] = 50.0
    chosen = choose(logits, [Draw(row, sampling(), 0) for row in range(8)])
    assert chosen.tolist() == [1000 * row for row in range(8)]


def test_random_numbers_are_even_and_below_one() -> None:
    numbers = [sampling(seed=seed).uniform(index) for seed in range(100) for index in range(100)]
    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert abs(np.mean(numbers) - 0.5) < 0.02
    assert len(set(numbers)) > 9_900


def test_a_sampled_request_gets_the_same_tokens_in_any_company_and_after_a_preemption() -> None:
    rows = [(0.0, 6 + i, 12) for i in range(6)]

    def tokens(kv_blocks: int, several: bool) -> list[list[int]]:
        found = []
        for group in [range(6)] if several else [[i] for i in range(6)]:
            engine = hw_engine(
                kv_blocks=kv_blocks,
                sampling=lambda request_id: sampling(1.5, 0.9, seed=request_id) if request_id != 3 else None,
            )
            engine.submit([requests(rows)[i] for i in group])
            state = engine.run_until(math.inf)
            found += [engine.tokens(i) for i in group]
            assert state.preemptions > 0 or kv_blocks > 20
        return found

    apart = tokens(200, several=False)
    assert tokens(200, several=True) == apart
    assert tokens(12, several=True) == apart
    greedy = hw_engine()
    greedy.submit(requests(rows))
    greedy.run_until(math.inf)
    plain = [greedy.tokens(i) for i in range(6)]
    assert plain[3] == apart[3]
    assert all(apart[i] != plain[i] for i in (0, 1, 2, 4, 5))
    assert all(0 <= token < VOCABULARY for row in apart for token in row)
