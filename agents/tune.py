"""``python -m agents.tune``: search over the keys of a training (agents/training/tune.py)."""

from agents.training.tune import main

if __name__ == "__main__":
    main()
