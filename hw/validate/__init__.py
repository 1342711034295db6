"""How far the simulator is from real runs. Four commands:

- ``python -m hw.compare RUN_SIM RUN_HW ...``: use it when you have run folders of both sides.
- ``python -m hw.fidelity``: use it without a GPU; it compares the simulator with a published run of vLLM.
- ``python -m hw.validate``: use it to run and compare the full suite of workloads and policies on this machine.
- ``python -m hw.swap_results``: use it to see what swapping preempted requests is worth on this machine.

Modules:

    compare         errors, noise and verdicts of one simulated run against real ones; import ``compare``, ``read_run``
    timeline        preemptions, plan changes and loads over time, from the files of a run
    fidelity        the published run
    suite           the suite: runs, repeats, verdicts
    suite_page      its results page
    swapping        swapping against recomputation, and its results page
    machine_speed   how fast the machine is during the suite

``agents.training.validation`` is unrelated: it selects the best checkpoint of a training on held-out episodes.
"""
