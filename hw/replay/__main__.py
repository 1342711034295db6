"""Command: ``python -m hw.replay``; see hw/replay/run.py."""

from hw.replay.run import main

if __name__ == "__main__":
    main()
