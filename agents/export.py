"""``python -m agents.export``: write a trained policy as files that NumPy runs (agents/training/export.py)."""

from agents.training.export import main

if __name__ == "__main__":
    main()
