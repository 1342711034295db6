"""Training with RLlib, imitation, cloning of a planner, and export to files that NumPy runs."""
