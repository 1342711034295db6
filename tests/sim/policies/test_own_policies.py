"""What someone's own policy may get wrong: each mistake ends in one line that says what a policy has to be."""

from __future__ import annotations

from pathlib import Path

import pytest

import sim.capacity.run
import sim.replay.__main__
from tests.commands import exit_status

FIRST = "        self.first_plan = dense_plan(context.model)\n"
NOTHING = "        pass\n"
NO_RETURN = "    def __call__(self, state):\n        self.first_plan\n"
NO_CALL = "    def decide(self, state):\n        return self.first_plan\n"
MISTAKES = {
    "no_return": (FIRST + NO_RETURN, "None is no Plan; a policy returns a Plan in every call"),
    "no_first": (NOTHING + NO_RETURN, "Own is no policy: first_plan is None; give it a Plan as self.first_plan"),
    "no_call": (FIRST + NO_CALL, "Own is no policy: it cannot be called; give it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_policy_is_named_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    module = f"own_{name}_of_test"
    (tmp_path / "mine" / "policy").mkdir(parents=True)
    code = f"from sim.cost.plan import dense_plan\n\n\nclass Own:\n    def __init__(self, context):\n{body}"
    (tmp_path / "mine" / f"{module}.py").write_text(code)
    (tmp_path / "mine" / "policy" / f"{name}.yaml").write_text(f"_target_: {module}.Own\n_partial_: true\n")
    own = ("--config-dir", "mine", "trace=poisson", "trace.duration_s=3")
    assert exit_status(sim.replay.__main__.main, *own, f"policy={name}") == 2
    assert message in capsys.readouterr().err
    if name != "no_return":
        assert exit_status(sim.capacity.run.main, *own, f"policies=[{name}]") == 2
        assert message in capsys.readouterr().err
