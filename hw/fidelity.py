"""Command: ``python -m hw.fidelity``; see hw/validate/fidelity.py."""

from hw.validate.fidelity import main

if __name__ == "__main__":
    main()
