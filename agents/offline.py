"""Command: ``python -m agents.offline``; see agents/training/offline.py."""

from agents.training.offline import main

if __name__ == "__main__":
    main()
