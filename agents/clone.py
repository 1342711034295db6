"""Command: ``python -m agents.clone``; see agents/training/clone.py."""

from agents.training.clone import clone_command

if __name__ == "__main__":
    clone_command()
