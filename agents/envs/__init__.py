"""Gymnasium environments: PruneToBudget-v0, ServeTrace-v0, ServeCluster-v0."""
