"""Hostile files of models, calibrations and quality tables."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.config import CONF_DIR
from sim.cost.latency import load_calibration
from sim.cost.model_spec import model_from_hf_config
from sim.cost.plan import dense_plan, drop, with_mask
from sim.cost.quality import fitted_path, read_fitted, read_published, table_hash
from tests.hw.serving import flat_latency_content
from tests.sim.serving import TINY
from tests.soak.kinds import Case, FaultError
from tests.soak.mutate import JSON_VALUES, mutate_json, mutate_text, to_json

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 4096,
        "sliding_window": 4096,
        "dtype": "float16",
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 4096,
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
        "torch_dtype": "float16",
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_dim": 128,
        "num_hidden_layers": 3,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 64,
        "do_layer_norm_before": True,
    },
}


def small_calibration() -> dict[str, Any]:
    """Return the content of a calibration file with every part that one may have."""
    content = flat_latency_content(1e3, 30.0)
    zeros = [0.0, 0.0]
    content["errors"] = {"linear": {"median": 0.01, "p95": 0.02, "points": 9, "note": ""}}
    content["device_run"] = {"host_to_device_bytes_per_s": 1e10, "copy_slowdown": 0.1}
    content["tables"]["shared_attention"] = {
        "fit_us": [1.0, 1.0, 1.0, 1.0, 1.0],
        "batch": [1, 2],
        "context": [1, 2],
        "us": [zeros, zeros],
        "prefill_tokens": [1, 2],
        "prefix": [0, 2],
        "residual": [1.0] * 16,
    }
    return content


def small_fit() -> dict[str, Any]:
    """Return the content of a file of fitted coefficients for three layers."""
    path = sorted((CONF_DIR / "quality" / "fitted").glob("*.json"))[0]
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    fit = next(fit for fit in content["fits"] if (fit["text"], fit["form"]) == ("test", "warped"))
    for name in ("blocks", "root"):
        fit[name] = fit[name][: 2 * TINY.num_layers]
    fit["kv"] = fit["kv"][: TINY.num_layers]
    content["fits"] = [fit]
    return content


class Files:
    """Files that describe a model, a device or a loss."""

    name = "files"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table = folder / "tiny.json"
        self._table.write_text("{}")
        fitted_path(self._table).parent.mkdir(exist_ok=True)
        fit = {**small_fit(), "table_sha256": table_hash(self._table), "model": "tiny"}
        published = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "quality" / "llama2_7b_published.yaml"))
        self._seeds = {
            "model": [json.dumps(content) for content in MODELS.values()],
            "calibration": [json.dumps(small_calibration())],
            "fitted quality": [json.dumps(fit)],
            "published quality": [json.dumps(published)],
        }
        self._readers: dict[str, Callable[[Path], None]] = {
            "model": _read_model,
            "calibration": _read_calibration,
            "fitted quality": self._read_fitted,
            "published quality": _read_published,
        }

    def make(self, rng: random.Random) -> Case:
        """Return one of the files, changed."""
        # YAML is read slowly, so there are few of these.
        target = rng.choices(list(self._seeds), weights=(40, 40, 17, 3))[0]
        text = rng.choice(self._seeds[target])
        if rng.random() < 0.15:
            return Case(target, mutate_text(text.encode(), rng))
        return Case(target, to_json(mutate_json(json.loads(text), rng), rng))

    def strategy(self) -> st.SearchStrategy[Case]:
        """Return hypothesis' strategy of model descriptions."""
        fields = sorted({name for content in MODELS.values() for name in content})
        valid = st.sampled_from([json.loads(text) for text in self._seeds["model"]])
        changed = st.dictionaries(st.sampled_from(fields), JSON_VALUES, max_size=3)
        return st.builds(lambda one, other: Case("model", json.dumps({**one, **other}).encode()), valid, changed)

    def feed(self, case: Case) -> str:
        """Read the file and use what it says."""
        path = self._folder / "hostile.json"
        path.write_bytes(case.content)
        self._readers[case.target](path)
        return "accepted"

    def _read_fitted(self, path: Path) -> None:
        path.replace(fitted_path(self._table))
        quality = read_fitted(self._table)
        _finite(quality.perplexity(dense_plan(TINY)))
        _finite(quality.perplexity(with_mask(dense_plan(TINY), drop(TINY, mha=[1], ffn=[0]))))

    def close(self) -> None:
        """Nothing runs."""


def _read_model(path: Path) -> None:
    spec = model_from_hf_config(path)
    if spec.total_params < 1 or spec.kv_bytes_per_token_layer < 1:
        raise FaultError("accepted a model without parameters", repr(spec))


def _read_calibration(path: Path) -> None:
    latency = load_calibration(path)
    for tokens in (1, 64, 10_000):
        _finite(latency.iteration_s(dense_plan(TINY), [(tokens, 5)], 3, 40, 1))
    if latency.copying is not None:
        _finite(latency.copying.host_to_device_bytes_per_s)


def _read_published(path: Path) -> None:
    quality = read_published(path)
    dense = dense_plan(quality.model)
    _finite(quality.nll(dense))
    if quality.model.num_layers > 1 and len(quality.points) > 1:
        _finite(quality.nll(with_mask(dense, drop(quality.model, mha=[1], ffn=[0]))))


def _finite(value: float) -> None:
    if not np.isfinite(value):
        raise FaultError("accepted a file that gives a number that is not finite", repr(value))
