"""Command: ``python -m agents.export``; see agents/training/export.py."""

from agents.training.export import main

if __name__ == "__main__":
    main()
