"""Records, metrics, reports and run folders. ``python -m sim.results`` writes the page of simulation results.

Every module is public: `records` (the tables that engines return), `metrics` (`Slo`, summary figures), `run_folder`
(what a run writes), `report` (tables of several runs) and `plots` (their figures).
"""
