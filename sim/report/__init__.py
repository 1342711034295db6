"""A run for people: ``python -m sim.report`` makes one HTML file, and a timeline for Perfetto, from run folders.

`run_data` reads a folder, `series` makes the numbers that are drawn, `figures` the figures, `page` the HTML and
`chrome_trace` the timeline. Nothing here runs code that a folder names, so a stranger's run is safe to look at.
"""
