"""Command ``python -m hw.fit``: fits the simulator to the runs of a server."""

from hw.fit.run import main

if __name__ == "__main__":
    main()
