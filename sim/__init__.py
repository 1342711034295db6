"""The simulator: traces, costs, engines, policies and replays. It needs no torch, no ray and no GPU.

A package imports only from packages above it in this table:

| package | holds |
|---|---|
| config | command lines, configurations and their errors |
| traces | arrivals and lengths of requests, read from files or generated |
| cost | what a plan costs in bytes, seconds and quality |
| results | records, metrics and reports |
| engine | the serving engine, in plain Python and compiled |
| policies | what chooses the plan |
| cluster | several replicas behind a router |
| disaggregate | prefill and decode on separate replicas |
| replay | a trace, an engine and a policy give a run folder |
| serve | the simulated engine, and the HTTP side of the real one, behind OpenAI's API |
| report | run folders as one HTML file |
| table | many run folders as one table |
| new | the first files of a policy of one's own |
| pages | pages of results |
| console | the `rap` command, a short name for every `python -m` command |
"""
