"""Command: ``python -m hw.disaggregate``; see hw/disaggregate/run.py."""

from hw.disaggregate.run import disaggregate_command

if __name__ == "__main__":
    disaggregate_command()
