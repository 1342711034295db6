"""Fits the simulator to the runs of a server: ``python -m hw.fit``. Needs neither torch nor a GPU.

readers/        measured runs, one format per file
measured        what a run says, checked
server          the described server, and a simulation of a run on it
regression      what a token costs: base, per running sequence, per prompt
diagnosis       what the run shows before anything is fitted
settings_tried  the same run under other settings
parameters      the numbers that may be fitted, and their priors
fitting         the fit, its held-out errors and their ranges
report          what is printed, written and plotted
"""
