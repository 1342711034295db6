"""Replays a trace against any OpenAI-compatible server: ``python -m hw.client client.url=http://127.0.0.1:8000``.

It writes the same records and summary as sim.replay and hw.replay, so that ``hw.compare`` can compare a simulated run
with a real server. In an open loop each request is sent at its arrival time, whatever the server does. In a closed loop
a fixed number of users each send their next request when the last one is answered. In a trace with sessions, turns come
their think time after the answers before them, and prompts begin with what was said: the real answers in a text, other
ids of the same number where prompts are token ids. What only a server knows (iterations, KV use, plans) stays empty.
This needs no torch and no tokenizer: prompts are random token ids, or text of about the right length.

settings    the keys of client.*
target      the server's address, a proxy on the way, the key
dialog      what has been said in a session
payload     prompts and the bodies of requests
stream      token times from the events of an answer; what TTFT, TPOT and ITL mean
replayer    sends requests and records the answers
run         the command, and its run folder
"""
