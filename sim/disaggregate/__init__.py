"""Prefill and decode on separate replicas, with KV caches sent between them: ``python -m sim.disaggregate``.

Others import `disaggregate` (`Disaggregated`), `links` (`Link`) and `run`.
"""
