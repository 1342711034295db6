"""Several replicas behind a router, with outages and an autoscaler."""
