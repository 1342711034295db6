"""An OpenAI-compatible server over the real engine.

    server          the command
    settings        its configuration under ``serve``
    connections     sockets, connections and signals
    guard           who may ask: hosts and the token
    api             the HTTP side
    requests        checks requests
    prompts         prompts as tokens
    choices         the choices of an answer while they are produced
    text_stream     from tokens to text: characters and stop strings
    answers         the bodies of the answers
    disconnect      notices clients that leave
    engine_thread   runs the engine in its own thread
    metrics         Prometheus metrics

Others import nothing from here; tests import ``Api`` and ``EngineThread``.
"""
