"""``python -m sim.new``: the first files of a policy of one's own.

run           the command: checks the name, writes the files, says how to run them
templates/    the files
"""
