"""Prefill and decode of the real model in two processes.

    run             the command: from a configuration to a run folder
    pair            the parent: starts both processes and collects what they report
    processes       what each process runs
    sides           the rules of the prefill and of the decode side
    hello           who may use the link: keys, and the wait for the right connection
    kv_link         frames over a socket, and transfers that share a bandwidth
    transfer        measures real transfers against simulated ones
    transfer_page   the results page of these measurements
    results         the command ``python -m hw.disaggregate_results``, which uses these two

Others import nothing from here.
"""
