"""Pages of results: the shared renderer, and the two pages on simulation."""
