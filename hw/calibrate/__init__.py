"""Measured and published prices of a device, written as the tables that the simulator reads."""
