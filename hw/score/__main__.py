"""Command: ``python -m hw.score``; see hw/score/run.py."""

from hw.score.run import main

if __name__ == "__main__":
    main()
