"""The real engine: the same serving rules as the simulator, on the wall clock."""
