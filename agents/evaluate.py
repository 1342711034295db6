"""``python -m agents.evaluate``: compare policies on held-out loads and windows (agents/evaluation/evaluate.py)."""

from agents.evaluation.evaluate import main

if __name__ == "__main__":
    main()
