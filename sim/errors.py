"""Every error that a user can cause: what was wrong, what is allowed, what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RapLabError(ValueError):
    """Base of all errors of this project, so that a caller can catch them together."""


class TraceError(RapLabError):
    """A trace file or a row of it cannot be used."""


class WorkloadError(RapLabError):
    """A workload step or a generator was asked for something impossible."""


class ModelError(RapLabError):
    """A model description is incomplete or of an unsupported family."""


class PlanError(RapLabError):
    """A plan is not legal for the model."""


class BudgetError(RapLabError):
    """The memory budget cannot hold what was asked for."""


class CalibrationError(RapLabError):
    """A calibration file is missing, malformed, or lacks a term that the plan needs."""


class ConfigError(RapLabError):
    """A configuration value is unknown or out of range."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``allowed`` as a readable list that puts the closest match to ``name`` first.

    Example: ``did you mean 'burstgpt'? allowed: azure_code, azure_conv, burstgpt``.
    """
    names = sorted(allowed)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"
