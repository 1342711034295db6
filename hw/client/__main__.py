"""Command: ``python -m hw.client``; see hw/client/run.py."""

from hw.client.run import main

if __name__ == "__main__":
    main()
