"""How far the simulation is from reality. Three commands, from one pair of runs to the full suite:

- ``python -m hw.compare RUN_SIM RUN_HW ...``: you have run folders of both sides; get errors, noise, verdicts.
- ``python -m hw.fidelity``: no GPU at hand; compare the simulator with a published run of vLLM on an RTX 4090.
- ``python -m hw.validate``: a real engine runs on this machine; serve all workloads under all policies on both sides.

``agents.training.validation`` is something else: it picks the best checkpoint of a training on held-out episodes.
"""
