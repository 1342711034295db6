"""What a plan costs in bytes, seconds and quality: pure functions of plan, model and GPU.

Every module is public: `model_spec`, `gpu` and `plan` (the values), `plan_json` (a plan as a file), `memory` and
`kv_format` (bytes), `latency` (seconds, and the schema of calibration files), `quality` and `added_losses` (loss).
Nothing here imports another package of sim, except its types, errors and paths.
"""
