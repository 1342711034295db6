"""Latency calibrations: published or measured kernel times, written as the tables that the simulator reads.

calibration     fits the tables and measures their error on held-out samples; import ``calibrate``
measurements    readers of published measurements, and the fits
published       which published files make which calibration: ``TARGETS``, ``DERIVED``
this_device     measures, fits and checks this device
device          the measurements of its terms
grid            which points of each term are measured
engine_runs     runs of the engine between the measurements, and what an iteration takes over its terms
figure          the graph of a calibration
plan_changes    the measurements of what a plan change costs
writing         writes the files and prints their errors
"""
