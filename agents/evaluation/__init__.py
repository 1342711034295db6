"""Evaluates learned policies and baselines on the same held-out loads, windows and clusters.

    evaluate                                     the command
    chosen                                       which policies and curves it reads
    measure                                      runs the policies and writes the result files
    prune, serve, cluster, roles                 the evaluation of each environment
    measure_serve, measure_roles, claim          the same for a claim that was committed before
    oracle                                       the best schedule of plans for a known window
    ablation                                     which entries of an observation a policy depends on
    statistics, figures, tables                  bootstrap intervals, figures and tables that the sections share
    prune_report, serve_report, cluster_report,
    roles_report                                 the sections of the results page
    page                                         the page

Nothing outside this package imports it, except ``agents.evaluate``.
"""
