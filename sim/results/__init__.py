"""Records, metrics, reports and run folders: ``python -m sim.results`` compares runs.

Every module is public: `records` (the tables that engines return), `metrics` (`Slo`, summary figures), `run_folder`
(what a run writes) and `report` (tables and plots of several runs).
"""
