"""How far the simulation is from the real engine, and from a published run."""
