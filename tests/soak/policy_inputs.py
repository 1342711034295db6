"""Hostile files of learned policies: safetensors with other types, sizes and headers, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sim.engine.protocol import EngineState
from sim.policies.base import PolicyContext
from sim.policies.learned import learned_prune
from sim.policies.observation.prune import prune_table
from tests.sim.serving import TINY, tiny_engine
from tests.soak.kinds import Case, FaultError
from tests.soak.mutate import mutate_bytes, mutate_json, to_json

TYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")
HIDDEN = 7


class Policies:
    """Files of a policy of PruneToBudget for a model of three layers."""

    name = "policy files"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "policy.json"
        table = prune_table(TINY)
        rng = np.random.default_rng(0)
        sizes = [(HIDDEN, table.features), (len(table.actions), HIDDEN)]
        self._arrays = {}
        for i, size in enumerate(sizes):
            self._arrays[f"{i}.weight"] = rng.normal(size=size).astype(np.float32)
            self._arrays[f"{i}.bias"] = rng.normal(size=size[0]).astype(np.float32)
        self._about = json.dumps(
            {
                "task": "PruneToBudget",
                "model": TINY.name,
                "layers": [list(size) for size in sizes],
                "activation": "relu",
                "environment": {"scores": False, "restore": False, "sequence": 1, "hide": []},
                "actions": list(table.actions),
                "observation": table.rows(),
                "scores": [0.5] * len(table.actions),
            }
        )
        self._weights = save(self._arrays)
        self._states = [self._state(share) for share in (10.0, 0.5)]

    def _state(self, share: float) -> EngineState:
        state = tiny_engine().run_until(0.0)
        budget = int(share * state.budget_bytes)
        return dataclasses.replace(state, budget_bytes=budget, next_budget_bytes=budget, running=3, running_tokens=90)

    def make(self, rng: random.Random) -> Case:
        """Return both files, one of them changed."""
        about: bytes = self._about.encode()
        if rng.random() < 0.5:
            return Case("JSON", to_json(mutate_json(json.loads(self._about), rng), rng), more={"w": self._weights})
        how = rng.random()
        if how < 0.4:
            return Case("safetensors", about, more={"w": mutate_bytes(self._weights, rng)})
        if how < 0.7:
            return Case("safetensors", about, more={"w": self._other_header(rng)})
        return Case("safetensors", about, more={"w": save(self._other_arrays(rng))})

    def _other_header(self, rng: random.Random) -> bytes:
        length = struct.unpack("<Q", self._weights[:8])[0]
        header = mutate_json(json.loads(self._weights[8 : 8 + length]), rng)
        text = to_json(header, rng)
        stated = len(text) if rng.random() < 0.8 else rng.choice((0, 1, len(text) - 1, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", stated) + text + self._weights[8 + length :]

    def _other_arrays(self, rng: random.Random) -> dict[str, Any]:
        arrays = {name: array.copy() for name, array in self._arrays.items()}
        name = rng.choice(list(arrays))
        how = rng.randrange(4)
        if how == 0:
            flat = arrays[name].reshape(-1)
            flat[rng.randrange(len(flat))] = rng.choice((math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0))
        elif how == 1:
            arrays[name] = arrays[name].astype(rng.choice(TYPES))
        elif how == 2:
            arrays[name] = rng.choice(
                (arrays[name].T.copy(), arrays[name].reshape(-1), arrays[name][:1], arrays[name][:0])
            )
        else:
            arrays[rng.choice(("2.weight", "0.weigh", ""))] = arrays.pop(name)
        return arrays

    def feed(self, case: Case) -> str:
        """Read the files and let the policy decide."""
        self._path.write_bytes(case.content)
        self._path.with_suffix(".safetensors").write_bytes(case.more["w"])
        policy = learned_prune(PolicyContext(model=TINY), path=str(self._path))
        network = policy.prune.network
        for array in (*network.weights, *network.biases):
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise FaultError("accepted weights that are not finite float32", str(array.dtype))
        for state in self._states:
            policy(state)
        return "accepted"

    def close(self) -> None:
        """Nothing runs."""
