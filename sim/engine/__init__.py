"""The serving engine: it turns requests and plans into records, on simulated time or on a device.

Read `protocol` first (the interface and the rules), then `replica` (the rules in plain Python).

| module | holds |
|---|---|
| **the rules, in plain Python** | |
| protocol | the `Engine` interface, its configuration, what it shows (`EngineState`), and the rules of serving |
| replica | `Replica`: arrivals, batches, preemption, plan changes; runs on any executor |
| replica_state | the state of a replica, and the tables and records made from it |
| scheduler | forms the batch of one iteration: `chunked` (vLLM V1) or `prefill_first` (vLLM V0) |
| live_request | a request inside a replica; the queues |
| budget | the memory budget over time |
| kv_manager, kv_pool, block_table | which KV blocks each request holds, which are free, what each holds |
| prefix_cache | KV blocks that requests with the same beginning share |
| transition, plan_changes, transition_log | what a plan change drops and copies; the change under way; its log |
| iteration_log | one row per iteration, and the gaps between tokens |
| **the seams** | |
| executor | the protocols behind a replica: `Executor`, `Weights`, `Clock` |
| pricing_executor | their simulated versions: time from a latency model, nothing is computed |
| **the compiled twin** | |
| kernel | the same rules, compiled with Numba |
| sim_engine | `SimEngine`: the kernel as an `Engine` on SimPy's clock |
| plan_graph | what follows from each plan, computed once in Python and read by the kernel |
| batch_step | many engines stepped by one compiled call, for training |
| **how to build one** | |
| server_spec | `ServerSpec`: model, GPU, configuration and prices; `build_engine` |

Other packages may import every module listed here, but of `kernel` only what its `__init__` names (sim/cluster also
uses its parts).
"""
