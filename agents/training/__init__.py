"""Training with RLlib, imitation, and export to NumPy."""
