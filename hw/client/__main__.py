"""Command: ``python -m hw.client``; see hw/client/client.py."""

from hw.client.client import main

if __name__ == "__main__":
    main()
