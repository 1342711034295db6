"""Command: ``python -m agents.train``; see agents/training/train.py."""

from agents.training.train import train_command

if __name__ == "__main__":
    train_command()
