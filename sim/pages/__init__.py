"""Pages of results: the shared renderer, and the two pages on simulation.

Others import `render` (templates to Markdown) and `comparison` (replays that stand in one table). `simulation` and
`clusters` each make one page; the prose is in templates/.
"""
