"""``python -m agents.offline``: record the episodes of a policy, to learn from (agents/training/offline.py)."""

from agents.training.offline import main

if __name__ == "__main__":
    main()
