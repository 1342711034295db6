"""An OpenAI-compatible server: over the simulated engine here, over the real one in hw/serve.

Shared by both:

    run             listens, serves and stops
    settings        the configuration under ``serve``
    connections     sockets, connections and signals
    guard           who may ask: hosts and the token
    api             the HTTP side
    requests        checks requests
    sampling        how a request wants its tokens chosen
    prompts         prompts as tokens
    choices         the choices of an answer while they are produced
    text_stream     from tokens to text: characters and stop strings
    answers         the bodies of the answers
    disconnect      notices clients that leave
    engine_thread   runs the engine in its own thread
    metrics         Prometheus metrics

The simulated server:

    server          the command ``python -m sim.serve``
    filler          counts the tokens of a text, and makes the words of answers
    simulated_api   lengths and words of answers
    simulated_thread  runs the simulated engine in step with the clock
    recording       the run folder of a server
"""
