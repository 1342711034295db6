"""An OpenAI-compatible server over the real engine.

    server          the HTTP server and its configuration
    engine_thread   runs the engine in its own thread
    requests        checks requests
    answers         the bodies of the answers
    metrics         Prometheus metrics

Others import nothing from here; tests import ``Api`` and ``EngineThread``.
"""
