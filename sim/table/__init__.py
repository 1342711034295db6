"""Tables of many runs.

run         ``python -m sim.table``: the table of a sweep, or of any folder with runs
list_runs   ``python -m sim.runs``: the latest runs
table       the table: Parquet with every figure, Markdown with the most wanted
index       finds run folders, and reads what tables show of them
"""
