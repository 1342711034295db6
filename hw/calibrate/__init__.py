"""Latency calibrations: published or measured kernel times, written as the tables that the simulator reads.

calibration     fits the tables and measures their error on held-out samples; import ``calibrate``
measurements    readers of published measurements, and the fits
published       which published files make which calibration: ``TARGETS``, ``DERIVED``
this_device     measures, fits and checks this device
device          the measurements of its terms
plan_changes    the measurements of what a plan change costs
writing         writes the files and prints their errors
"""
