"""Command: ``python -m hw.disaggregate_results``; see hw/disaggregate/transfer_page.py."""

from hw.disaggregate.transfer_page import main

if __name__ == "__main__":
    main()
