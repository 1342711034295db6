"""Several replicas behind a router, with outages and an autoscaler: ``python -m sim.cluster``.

Others import `cluster` (`Cluster`, `Replica`), `routers`, `outages`, `autoscaler` and `run`. `kernel` is the compiled
loop; only sim/disaggregate may use it too.
"""
