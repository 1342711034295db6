"""Command: ``python -m agents.evaluate``; see agents/evaluation/evaluate.py."""

from agents.evaluation.evaluate import main

if __name__ == "__main__":
    main()
