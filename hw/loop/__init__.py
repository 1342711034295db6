"""The loop: predict in simulation how policies compare, then serve the same windows for real, and judge the prediction.

    python -m hw.loop

In each round, one window after the other is predicted and served: reference runs measure the machine's speed, the
window is simulated under every policy at that speed, and the predictions are written to a file whose SHA-256 goes into
the results. Only then the judged runs of the window start. The speed of a shared machine moves within minutes, so a
window is served right after it was predicted.

Modules:

    settings        the keys of the command; the configuration of one run
    predictions     the machine's speed, and what the simulator says before the judged runs
    judged_runs     the real runs, in random order; runs that exist are kept
    verdict         the claims, from utilities alone
    page            the results page and its graph
    run             the command
"""
