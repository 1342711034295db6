"""What a learned policy observes, as arrays of fixed length: `serve`, `cluster` and `prune`, one per environment."""
