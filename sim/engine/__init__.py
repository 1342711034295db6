"""The serving engine: the protocol, the scheduler, plan changes, the budget, and the compiled simulation."""
