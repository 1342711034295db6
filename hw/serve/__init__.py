"""``python -m hw.serve``: an OpenAI-compatible server over the real engine (``server``).

Everything but the engine is shared with the simulated server: sim/serve.
"""
