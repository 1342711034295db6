"""Pages made from committed figures: `python -m sim.results`, `python -m sim.cluster_results`, and the shared renderer."""
