"""The Gymnasium environments: PruneToBudget-v0, ServeTrace-v0 and ServeCluster-v0."""
