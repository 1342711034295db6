"""``python -m agents.train``: train a policy with RLlib (agents/training/train.py)."""

from agents.training.train import main

if __name__ == "__main__":
    main()
