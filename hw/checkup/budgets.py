"""Step: the budget shrinks while requests run, and an allocation exceeds it. Every request must still finish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from hw.checkup.findings import Findings
from hw.checkup.setup import Setup
from hw.elastic.device import SEGMENTS_BYTES, Accelerator
from hw.elastic.device_memory import out_of_memory
from hw.engine.clock import RealClock
from hw.engine.hw_engine import HwEngine
from hw.engine.prompts import RandomPrompts
from sim.config import build
from sim.cost.plan import dense_plan
from sim.engine.budget import Budget
from sim.engine.protocol import Request
from sim.results.records import Status

SHARE = 0.6
"""What is left of the KV part of the budget in its middle third."""
OVERRUN_AT = (3, 9)
"""The passes in the middle of which an allocation goes beyond the budget."""
MOST_BYTES = 1 << 50
"""More than any machine has: on a CPU only such an allocation fails."""


class Overrun:
    """Allocates more than the budget allows in the middle of some passes.

    passes: so far. refused: allocations that failed, as they should.
    """

    def __init__(self, hardware: object, place: torch.device) -> None:
        """Allocate on this device."""
        self.passes = self.refused = self.granted = 0
        self.budget_bytes = 0
        self._hardware, self._place = hardware, place

    def size(self) -> int:
        """Return the bytes of an allocation that goes beyond the budget."""
        if not isinstance(self._hardware, Accelerator):
            return MOST_BYTES
        return max(self.budget_bytes - self._hardware.in_use_bytes(), 0) + 4 * SEGMENTS_BYTES

    @contextmanager
    def during_forward(self) -> Iterator[None]:
        """Allocate, then compute."""
        self.passes += 1
        if self.passes in OVERRUN_AT:
            try:
                torch.empty(self.size(), dtype=torch.uint8, device=self._place)
                self.granted += 1
            except (RuntimeError, MemoryError) as error:
                self.refused += out_of_memory(error)
                raise
        yield


def run(setup: Setup, findings: Findings) -> None:
    """Serve requests through a budget that falls and rises."""
    elastic, _ = setup.loaded()
    amounts, spec = setup.amounts, elastic.spec
    plan, config = dense_plan(spec), build(setup.config().engine)
    clock = RealClock("wall", skip_idle=True)
    high = setup.budget_bytes(amounts.kv_tokens[0])
    low = setup.budget_bytes(round(amounts.kv_tokens[0] * SHARE))
    overrun = Overrun(elastic.hardware, elastic.device)
    overrun.budget_bytes = high
    free_before = _free_bytes(setup)
    engine = HwEngine(
        elastic=elastic,
        config=config,
        plan=plan,
        budget_bytes=Budget((0.0, 1.0, 2.0), (high, low, high)),
        workspace_bytes=amounts.workspace_bytes,
        prompts=RandomPrompts(spec.vocab_size, setup.seed),
        clock=clock,
        during_forward=overrun.during_forward,
        plans=[plan],
    )
    requests = [
        Request(
            request_id=i,
            arrival_s=3.0 * i / amounts.requests,
            prompt_tokens=amounts.prompt_tokens,
            output_tokens=amounts.output_tokens,
        )
        for i in range(amounts.requests)
    ]
    engine.submit(requests)
    kv_bytes, free = [], []
    for until_s in (0.9, 1.9, float("inf")):
        engine.run_until(until_s)
        kv_bytes.append(engine.arena.allocated_bytes)
        free.append(_free_bytes(setup))
    findings.figure("budget_bytes", [high, low, high])
    findings.figure("kv_bytes", kv_bytes)
    findings.figure("free_bytes", {"before": free_before, "at each budget": free})
    status = engine.records().status
    finished = int((status == Status.FINISHED).sum())
    findings.check("requests that finished", finished == amounts.requests, finished, str(amounts.requests))
    produced = sum(len(engine.tokens(i)) for i in range(amounts.requests))
    wanted = amounts.requests * amounts.output_tokens
    findings.check("tokens produced", produced == wanted, produced, str(wanted))
    findings.check("KV bytes at the smaller budget", kv_bytes[1] < kv_bytes[0], kv_bytes[1], f"below {kv_bytes[0]}")
    findings.figure("out_of_memory", engine.out_of_memory)
    findings.check("allocations beyond the budget that failed", overrun.refused > 0, overrun.refused, "one at least")
    findings.check("allocations beyond the budget that did not", not overrun.granted, overrun.granted, "none")
    differences = [abs(row.allocated_bytes - row.predicted_bytes) for row in engine.memory_rows()]
    findings.check("difference between allocated and predicted bytes", max(differences) == 0, max(differences), "0")
    most = max(row.in_use_bytes for row in engine.memory_rows())
    findings.figure("peak_in_use_bytes", most)
    engine.check()
    engine.close()
    _check_limit_is_gone(setup, findings, overrun)


def _check_limit_is_gone(setup: Setup, findings: Findings, overrun: Overrun) -> None:
    """Check that after the run the process may allocate what the budget did not allow, if the device has it."""
    if not setup.on_gpu:
        return
    size, free = overrun.size(), _free_bytes(setup) or 0
    if size > free:
        findings.figure("limit_after_close", f"not tried: {size} bytes of {free} free")
        return
    got = False
    with suppress(RuntimeError):
        torch.empty(size, dtype=torch.uint8, device=setup.device)
        got = True
    findings.check("the same allocation after the run", got, got, "succeeds")


def _free_bytes(setup: Setup) -> int | None:
    """Return the free memory of a GPU, as the driver counts it: it must grow when the KV pool shrinks."""
    if not setup.on_gpu:
        return None
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(torch.device(setup.device))[0]
    return free
