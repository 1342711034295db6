"""Command: ``python -m hw.serve``; see hw/serve/server.py."""

from hw.serve.server import main

if __name__ == "__main__":
    main()
