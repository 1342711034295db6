"""Policies of PruneToBudget evaluated on a few loads, for several tests."""

from __future__ import annotations

import pandas as pd
import pytest

from agents.evaluation.prune import baselines, evaluate_prune
from tests.agents.helpers import FEW_LOADS, SMALL_MODEL


@pytest.fixture(scope="session")
def played() -> pd.DataFrame:
    return evaluate_prune(SMALL_MODEL.name, baselines(SMALL_MODEL), FEW_LOADS)
