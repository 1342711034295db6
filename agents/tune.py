"""Command: ``python -m agents.tune``; see agents/training/tune.py."""

from agents.training.tune import main

if __name__ == "__main__":
    main()
