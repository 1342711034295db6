"""``python -m agents.clone``: train a policy to imitate a planner that looks ahead (agents/training/clone.py)."""

from agents.training.clone import main

if __name__ == "__main__":
    main()
