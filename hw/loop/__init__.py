"""The loop: predict in simulation how policies compare, then serve the same windows for real, and judge the prediction.

    python -m hw.loop

In each round, every window is served under every policy. Right before each of these judged runs, reference runs
measure the machine's speed, the window is simulated under the policy at that speed, and the prediction is written to a
file whose SHA-256 goes into the results: the speed of a shared machine moves within minutes. On a machine of steady
speed, reference runs can be for a whole window under all policies (``predict_each=window``).

Modules:

    settings        the keys of the command; the configuration of one run
    predictions     the machine's speed, and what the simulator says before the judged runs
    judged_runs     the real runs, in random order; runs that exist are kept
    verdict         the claims, from utilities alone
    page            the results page and its graph
    run             the command
"""
