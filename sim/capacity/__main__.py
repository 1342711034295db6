"""Command: ``python -m sim.capacity``; see sim/capacity/run.py."""

from sim.capacity.run import main

if __name__ == "__main__":
    main()
