"""The real model: measure it, serve with it, compare it with the simulator. Imports ``sim``, never the other way.

elastic        a Hugging Face model that takes plans
engine         the engine that serves with it, by the simulator's rules
replay         ``python -m hw.replay``: a trace on the real engine
serve          ``python -m hw.serve``: the OpenAI-compatible server of sim/serve over the real engine
client         ``python -m hw.client``: a trace against any such server
disaggregate   ``python -m hw.disaggregate``: prefill and decode in two processes
calibrate      ``python -m hw.calibrate``: latency tables for the simulator
score          ``python -m hw.score``: block orders and the quality table
validate       ``python -m hw.compare``, ``hw.fidelity``, ``hw.validate``: how far the simulator is from real runs
"""
