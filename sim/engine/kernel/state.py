"""The state of a replica, field by field, with units; each array is declared together with its access function.

A request is its index in the order of arrival; a running one also has a **slot**. Each running request holds the KV of
one set of MHA blocks, its **KV set**; there are few different sets, so a slot refers to a row of `kv_sets`. At any time
a replica is at a **residency**: the blocks on the device, and the wanted plan (sim/engine/plan_graph.py).

Shapes: ``rows`` and ``columns`` of each declaration, as functions of `Sizes` ``z``; arrays without them start empty and
are replaced by longer ones. A set of layers is W = ceil(layers / `LAYERS_A_WORD`) int64 words.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.compiled import compiled, constant
from sim.engine.kernel.layout import FLOAT64, INT64, Layout, Table

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NEVER = 1 << 62
"""A clock value, or a number of tokens, that is never reached."""
FILLED = NEVER - 1
"""The ``fill_tokens`` of a request all of whose prompt has been passed, and that may still add its answer."""
WAITING, RUNNING, FINISHED, REJECTED = range(4)
"""The values of ``sim.results.records.Status``."""
ZERO = constant(0)
"""0 as a typed value (``sim.compiled.constant``)."""
NO_OWNER = constant(-1)
"""The owner of free KV blocks that no one can reuse (sim/engine/kv_pool.py)."""
NO_FORMAT = constant(-1)
"""The ``kv_format_id`` of a request or plan that keeps all tokens at 16 bits."""
HORIZON, NEEDS, GROW, STALLED = range(4)
"""Why `advance` returned; its docstring explains each."""
NO_SESSIONS, OWN_SESSIONS, REPORTED = range(3)
"""Values of ``in_sessions``: requests come at given times; turns follow others; a cluster learns which have ended."""
NEED_DECISION, NEED_COPY_END, NEED_PRICE = range(3)
"""What Python has to add to the plan graph: the values of ``needed``."""
LAYERS_A_WORD = 60
"""Layers per word; fewer than 64, so that words stay positive."""


class SchedulingRule(IntEnum):
    """The schedulers (sim/engine/scheduler.py); the first part of admission.py implements what differs."""

    CHUNKED = 0
    PREFILL_FIRST = 1


CHUNKED, PREFILL_FIRST = (int(rule) for rule in SchedulingRule)


class Sizes(NamedTuple):
    """The quantities that determine the array sizes of one replica."""

    slots: int  # requests that may run at once
    layers: int  # layers of the model
    words: int  # W: int64 words of a set of layers
    most_block_tokens: int  # most tokens of a KV block, at any of the ways to store them
    kv_sets: int  # KV sets that can exist at once
    free_runs: int  # runs of free KV blocks that can exist at once
    precisions: int  # number of precisions of weights
    kv_precisions: int  # number of ways to store the KV of a layer: its precisions, and hidden states
    log_rows: int  # initial rows of the iteration log


REPLICA = Layout()

# -- settings and counters ---------------------------------------------------------------------------------------------

COUNTERS = np.dtype(
    [
        # Settings of the engine.
        ("scheduling_rule", INT64),  # SchedulingRule
        ("admits_by_value", INT64),  # whether the most valuable request is admitted first, not the one that came first
        ("max_batch_tokens", INT64),  # tokens that an iteration may compute
        ("long_prefill_tokens", INT64),  # longest chunk of a prompt, tokens; 0 for no limit
        ("reserve_full_prompt", INT64),  # whether admission needs room for the full prompt
        ("block_tokens", INT64),  # tokens of a KV block
        ("block_bytes", INT64),  # bytes of a KV block of one layer
        ("workspace_bytes", INT64),  # activations and the like, bytes
        ("slots", INT64),  # requests that may run at once under any plan
        ("least_free_blocks", INT64),  # KV blocks that an admission leaves free, for a pool of any size
        ("watermark_share", FLOAT64),  # share of the pool that it leaves free in addition
        ("reuse_preempted_kv", INT64),  # whether a preempted request may find its KV again
        ("recompute_on_restore", INT64),  # whether a restored MHA block preempts requests that lack its KV
        ("quality_charged", INT64),  # whether requests are charged nats per token
        ("log_enabled", INT64),  # whether iterations are logged
        ("schedules_ahead", INT64),  # whether a batch is formed when the iteration before it starts
        ("prefix_caching", INT64),  # whether there is a prefix cache
        ("prefix_block_tokens", INT64),  # tokens of a prefix block
        ("prefix_block_kv_blocks", INT64),  # KV blocks of one layer that a prefix block fills
        ("free_runs_kept", INT64),  # whether the last owners of free KV blocks are tracked
        ("notice_s", FLOAT64),  # how long before a budget step it is announced, s
        ("slowdown", FLOAT64),  # an iteration takes this times as long as the latency model says
        ("copy_slowdown", FLOAT64),  # iterations during a copy take 1 + this times as long
        ("copy_bytes_per_s", FLOAT64),  # from host to device, bytes/s
        ("copy_layer_s", FLOAT64),  # seconds of each layer's copy in addition
        ("qkv_share", FLOAT64),  # of q, k and v in the products of an MHA block (ModelSpec.qkv_share)
        ("copies_block", INT64),  # whether no iteration starts while a layer is copied in
        ("host_blocks", INT64),  # KV blocks of one layer that host memory holds for swapped requests; 0: no swapping
        # The running plan.
        ("residency", INT64),  # present node of the plan graph; -1 before the first plan
        ("target", INT64),  # number of the plan that the last change leads to
        ("decided_target", INT64),  # number of a plan decided on whose change has not begun; -1 for none
        ("decided_s", FLOAT64),  # when it was decided on, s
        ("max_running", INT64),  # requests that may run at once
        ("max_waiting", INT64),  # requests that may wait; -1 for no limit
        ("max_wait_s", FLOAT64),  # how long a request may wait for its admission, s; inf for no limit
        ("max_wait_since_s", FLOAT64),  # when that limit came into force, s; -inf for the first plan's
        ("kv_format_id", INT64),  # row of kv_format_tokens and kv_format_bits; -1 for all tokens at 16 bits
        ("kv_percent", INT64),  # of the bytes of a prompt's KV that stay after its prefill
        ("stream_id", INT64),  # number of what crosses the link in each iteration; -1 for nothing
        ("streams_at", INT64),  # first row of stream_bytes and stream_shares for it
        ("streams", INT64),  # streamed layers
        ("kv_only", INT64),  # layers in which only the last token of a prompt does more than write KV
        ("cuts_ffn", INT64),  # whether some FFN block runs at fewer channels
        ("first_stream_s", FLOAT64),  # when the first two streamed layers of the next pass are on the device, s
        ("second_stream_s", FLOAT64),
        ("prefill_set", INT64),  # KV set that the plan runs in prefill; new requests get it
        ("decode_set", INT64),  # KV set that the plan runs in decode
        ("kv_set_count", INT64),  # KV sets in use
        ("caching", INT64),  # whether the running plan can use the prefix cache
        ("copy", INT64),  # row of the copy under way; -1 for none
        ("copy_end_s", FLOAT64),  # when it is complete, s; inf for none
        ("incoming_bytes", INT64),  # bytes of the blocks being copied in
        ("weight_bytes", INT64),  # bytes of resident weights
        ("budget_step", INT64),  # step of the budget in force
        ("budget_moved", INT64),  # whether memory has yet to follow a new step
        ("next_decision", INT64),  # first scheduled decision that has not been taken
        ("next_decision_s", FLOAT64),  # its time, s; inf for none
        ("decision_count", INT64),  # scheduled decisions
        ("open_change", INT64),  # row of the plan change that is under way; -1 for none
        ("change_count", INT64),  # rows of plan_changes
        ("resident_bytes_count", INT64),  # rows of resident_bytes_log
        ("change_preemptions", INT64),  # requests that plan changes preempted since the last iteration
        ("violation_s", FLOAT64),  # time so far in which the held bytes exceeded the budget, s
        ("followed_s", FLOAT64),  # time up to which that is counted, s
        ("over_since_s", FLOAT64),  # start of the present stretch over budget, s; nan for none
        ("violation_before_s", FLOAT64),  # violation_s at that start
        ("needed", INT64),  # what the plan graph lacks: NEED_DECISION, NEED_COPY_END or NEED_PRICE
        ("needed_residency", INT64),  # at this residency
        ("needed_index", INT64),  # for this target, copy or candidate set
        # Requests.
        ("request_count", INT64),  # submitted
        ("arrived", INT64),  # arrived; also the index of the next arrival
        ("next_arrival_s", FLOAT64),  # its time, s; inf for none
        ("in_sessions", INT64),  # NO_SESSIONS; OWN_SESSIONS, and ``arrived`` is then no index; REPORTED
        ("due_count", INT64),  # entries of due_turns
        ("ended_count", INT64),  # entries of ended_turns
        ("next_session", INT64),  # first of session_starts that no user has begun
        ("queue_head", INT64),  # queue[head:tail] wait and have never run
        ("queue_tail", INT64),
        ("preempted_waiting", INT64),  # preempted requests that wait, on a stack
        ("running", INT64),  # requests with a slot
        ("decoding", INT64),  # running requests that gain a token in every decoding iteration
        ("formatted", INT64),  # running requests that keep only a part of their KV (kv_keep, kv_bits)
        ("formatted_decodes", INT64),  # those of them that decode
        ("formatted_tokens", INT64),  # sum of their tokens, less the clock for each
        ("next_limit", INT64),  # first clock at which a layer of one of them keeps no more tokens
        ("clock", INT64),  # decoding iterations so far
        ("next_due", INT64),  # first clock at which a decoding request has its last token
        ("group_count", INT64),  # rows of last_token_groups
        ("hash_id_count", INT64),  # hash ids of all prompts
        # KV blocks, each of one layer.
        ("pool_blocks", INT64),  # size of the pool
        ("free_blocks", INT64),  # free; negative while more is held than the pool has
        ("watermark_blocks", INT64),  # blocks that an admission leaves free
        ("free_run_head", INT64),  # free_runs[head:tail] are in use, the longest free first
        ("free_run_tail", INT64),
        ("prefix_block_count", INT64),  # prefix blocks numbered so far
        ("free_prefix_block", INT64),  # first number that can be used again; 0 for none
        ("host_free_blocks", INT64),  # those of host memory that are free
        ("moved_blocks", INT64),  # copied to the host and back; no iteration has taken the time for them yet
        ("found_held_blocks", INT64),  # prefix blocks of the last `_find_prefix` that others hold already
        # What comes too late for the next batch, if the engine schedules ahead; between two iterations only.
        ("known_tail", INT64),  # queue_tail at the start of the iteration under way, or the last one
        (
            "late_from",
            INT64,
        ),  # requests from here on in the queue came too late; NEVER if the batch is not formed ahead
        ("late_blocks", INT64),  # KV blocks freed too late
        ("late_ended", INT64),  # requests that ended too late for another to take their place
        # The iteration under way, or the last one.
        ("in_iteration", INT64),  # whether one is under way
        ("eager", INT64),  # whether its batch was formed request by request (`_form_eagerly`)
        ("decodes_in_batch", INT64),  # whether all decoding requests are in it
        ("batch_chunks", INT64),  # rows of batch
        ("batch_prefill_tokens", INT64),  # prompt tokens
        ("batch_ends", INT64),  # prompts that end with it
        ("batch_decodes", INT64),  # decoding requests
        ("batch_running", INT64),  # running requests
        ("batch_waiting", INT64),  # waiting requests
        ("batch_preemptions", INT64),  # requests preempted since the iteration before
        ("batch_extrapolated", INT64),  # whether it was priced outside the measured range
        ("used_blocks_before", INT64),  # KV blocks held until the last iteration ended
        ("now_s", FLOAT64),  # time to which the replica has advanced, s
        ("start_s", FLOAT64),  # start of the iteration, s
        ("end_s", FLOAT64),  # end of the iteration, s
        ("duration_s", FLOAT64),  # duration of the iteration, s
        ("iteration_priced_s", FLOAT64),  # what the latency model says it takes, s
        # Sums from the start on.
        ("waiting_tokens", INT64),  # prompt and produced tokens of waiting requests, now
        ("running_tokens", INT64),  # tokens of running requests whose KV is held, now
        ("arrived_prompt_tokens", INT64),
        ("first_tokens", INT64),  # requests that have their first token
        ("ttft_sum_s", FLOAT64),  # sum of their times to first token, s
        ("produced_tokens", INT64),
        ("finished", INT64),  # requests
        ("rejected", INT64),  # requests
        ("preemptions", INT64),
        ("iterations", INT64),
        ("busy_s", FLOAT64),  # time in iterations that have ended, s
        ("priced_s", FLOAT64),  # what the latency model says they take, s
        ("log_count", INT64),  # rows of iteration_log
        ("itl_count", INT64),  # rows of itl_counts
    ],
    align=True,
)
counters_of = REPLICA.record("counters", COUNTERS, saved=True)

# -- requests ----------------------------------------------------------------------------------------------------------

REQUEST = np.dtype(
    [
        # The record of a decoding request dates from the clock at which it joined; `settle` brings it up to date.
        ("prompt_tokens", INT64),
        ("output_limit_tokens", INT64),  # tokens that it may produce
        ("computed_tokens", INT64),  # tokens whose KV exists; if waiting, tokens it finds without the prefix cache
        ("produced_tokens", INT64),
        ("prefill_tokens", INT64),  # prompt and produced tokens when it was last admitted
        ("preemptions", INT64),
        ("status", INT64),  # WAITING, ...
        ("free_run", INT64),  # run of free KV blocks that still holds its KV; -1 for none
        ("host_blocks", INT64),  # KV blocks that it holds in host memory; 0 unless it is swapped
        ("kept_params", INT64),  # parameters that ran, summed over its tokens
        ("arrival_s", FLOAT64),  # s
        ("admitted_s", FLOAT64),  # first admission, s; nan before
        ("first_token_s", FLOAT64),  # s; nan before
        ("last_token_s", FLOAT64),  # s; nan before
        ("finish_s", FLOAT64),  # s; nan before
        ("nll_sum", FLOAT64),  # nats charged for its tokens
    ],
    align=True,
)
requests_of = REPLICA.array("requests", REQUEST)
request_words_of = REPLICA.words("requests")
TURN = np.dtype([("after", INT64), ("think_s", FLOAT64)], align=True)  # the request that follows, -1: none; its pause
turns_of = REPLICA.array("turns", TURN)  # with sessions, one a request
session_starts_of = REPLICA.array("session_starts")  # first requests of the sessions that wait for a user, in order
DUE_TURN = np.dtype([("at_s", FLOAT64), ("request", INT64)], align=True)
due_turns_of = REPLICA.array("due_turns", DUE_TURN, saved=True)  # with sessions: requests whose time is known, a heap
ended_turns_of = REPLICA.array("ended_turns")  # if they are reported: rows of requests that have ended since
arrival_order_of = REPLICA.array("arrival_order")  # with sessions: requests in the order of their arrivals
queue_of = REPLICA.array("queue")  # requests in order of arrival; [queue_head:queue_tail] wait
preempted_stack_of = REPLICA.array("preempted_stack", rows=lambda z: z.slots + 1, saved=True)  # last in, first out

SLOT = np.dtype(
    [
        ("request", INT64),
        ("next", INT64),  # slot admitted after this one; the extra last slot is both ends of the ring
        ("previous", INT64),  # slot admitted before this one
        ("kv_set", INT64),  # row of kv_sets
        ("joined_clock", INT64),  # clock as of which the record of its decoding request is up to date
        ("kv_format_id", INT64),  # row of kv_format_tokens and kv_format_bits; -1 for all tokens at 16 bits
        ("summed_tokens", INT64),  # decoding, with a KV format: tokens it stored when it was added to the sums
        ("limit_clock", INT64),  # clock at which another of its layers keeps no more tokens; NEVER if none will
        ("saved_tokens", INT64),  # tokens whose bytes its compressed prompt does not take, in each layer
        ("shared_blocks", INT64),  # KV blocks of one layer in the prefix blocks that it holds
        ("fill_tokens", INT64),  # tokens at the end of the next prefix block that it fills; FILLED, or NEVER for none
    ],
    align=True,
)
slots_of = REPLICA.array("slots", SLOT, rows=lambda z: z.slots + 1, saved=True)
# Clock at which a decoding request has its last token; NEVER if it does not decode. Not a field of SLOT: every finish
# reads all of them, and a dense array is faster to scan.
due_clocks_of = REPLICA.array("due_clocks", rows=lambda z: z.slots + 1, saved=True)
free_slots_of = REPLICA.array("free_slots", rows=lambda z: z.slots + 1, saved=True)  # a stack

CHUNK = np.dtype([("slot", INT64), ("tokens", INT64)], align=True)  # tokens of a request that an iteration computes
batch_of = REPLICA.array("batch", CHUNK, rows=lambda z: z.slots + 1, saved=True)

# Numbers of decoding requests by the time of their last token. Group 0 got one in the last decoding iteration.
GROUP = np.dtype([("last_token_s", FLOAT64), ("requests", INT64)], align=True)
last_token_groups_of = REPLICA.array("last_token_groups", GROUP, rows=lambda z: z.slots + 2, saved=True)

# KV blocks, over all layers, that decoding requests take in the iteration of clock c: a row for each precision, in it
# entry -c modulo the tokens of its KV block.
blocks_due_by_phase_of = REPLICA.array(
    "blocks_due_by_phase", rows=lambda z: z.kv_precisions, columns=lambda z: z.most_block_tokens, saved=True
)

# -- KV blocks and the prefix cache ------------------------------------------------------------------------------------

# Runs of free KV blocks. owner: the request whose KV they still hold, NO_OWNER - n for prefix block n, or NO_OWNER.
FREE_RUN = np.dtype([("owner", INT64), ("blocks", INT64)], align=True)
free_runs_of = REPLICA.array("free_runs", FREE_RUN, rows=lambda z: z.free_runs, saved=True)

PROMPT = np.dtype(
    [
        ("hash_at", INT64),  # where its hash ids begin in hash_ids
        ("prefix_blocks", INT64),  # prefix blocks that lie in the prompt; once it has ended, in prompt and answer
        ("answer_blocks", INT64),  # those that lie in prompt and answer, as far as there are hash ids for them
        ("cached_tokens", INT64),  # tokens found when it was first admitted; -1 before
    ],
    align=True,
)
prompts_of = REPLICA.array("prompts", PROMPT, saved=True)  # with a prefix cache, one a request
hash_ids_of = REPLICA.array("hash_ids")  # of all prompts, one after the other, numbered from 0
held_prefix_blocks_of = REPLICA.array("held_prefix_blocks", saved=True)  # held at each place of hash_ids; 0: none
prefix_block_of_id_of = REPLICA.array("prefix_block_of_id", saved=True)  # cached under each hash id; 0: none

PREFIX_BLOCK = np.dtype(
    [
        ("holders", INT64),  # requests that hold it; -1 if its number is not in use
        ("hash_id", INT64),  # hash id by which it is found; -1 if it cannot be found any more
        ("free_run", INT64),  # without holders: its run of free KV blocks; number not in use: the next such number
        ("kv_set", INT64),  # row of kv_sets: the MHA blocks whose KV it contains
    ],
    align=True,
)
prefix_blocks_of = REPLICA.array("prefix_blocks", PREFIX_BLOCK, rows=1, saved=True)  # numbered from 1

# -- sets of MHA blocks whose KV requests hold -------------------------------------------------------------------------

KV_SET = np.dtype(
    [
        ("layers", INT64),  # layers in it
        ("decodes", INT64),  # decoding requests that hold it
        ("context_tokens", INT64),  # sum of their tokens, less the clock for each
        ("prefill_params", INT64),  # parameters that run for a prompt token
        ("decode_params", INT64),  # parameters that run for a decoded token
        ("after_prefill", INT64),  # KV set that remains of it when a prefill ends
        ("prefill_nll", FLOAT64),  # nats charged for the first token
        ("decode_nll", FLOAT64),  # nats charged for each later token
    ],
    align=True,
)
kv_sets_of = REPLICA.array("kv_sets", KV_SET, rows=lambda z: z.kv_sets, saved=True)
kv_set_words_of = REPLICA.array("kv_set_words", rows=lambda z: z.kv_sets, columns=lambda z: z.words, saved=True)

# Work space of a plan change: the future KV sets, and which of them replaces each present one.
candidate_sets_of = REPLICA.array("candidate_sets", rows=lambda z: z.kv_sets + 1, columns=lambda z: z.words)
SET_REMAP = np.dtype(
    [
        ("prefill", INT64),  # new set of requests in prefill; -1 if none of them holds the old set
        ("decode", INT64),  # new set of decoding requests; -1 if none of them holds the old set
        ("layers_before", INT64),  # layers of the old set
        ("price", INT64),  # row of prices for the new set with this index
    ],
    align=True,
)
set_remap_of = REPLICA.array("set_remap", SET_REMAP, rows=lambda z: z.kv_sets + 1)

# -- logs --------------------------------------------------------------------------------------------------------------

ITERATION = np.dtype(
    [
        ("start_s", FLOAT64),
        ("end_s", FLOAT64),
        ("kv_used_share", FLOAT64),  # of the pool
        ("prefill_tokens", INT64),
        ("decode_requests", INT64),
        ("running", INT64),
        ("waiting", INT64),
        ("preemptions", INT64),
        ("extrapolated", INT64),  # whether a latency table was read beyond its last point
    ],
    align=True,
)
iteration_log_of = REPLICA.array("iteration_log", ITERATION, rows=lambda z: z.log_rows)

ITL_COUNT = np.dtype([("itl_s", FLOAT64), ("count", INT64)], align=True)  # equal times between two tokens of a request
itl_counts_of = REPLICA.array("itl_counts", ITL_COUNT, rows=lambda z: 1024 + 4 * z.slots)

PLAN_CHANGE = np.dtype(
    [
        ("decided_s", FLOAT64),
        ("ready_s", FLOAT64),  # when the last copy was complete, s; nan before
        ("from_residency", INT64),
        ("target", INT64),
        ("bytes_in", INT64),  # copied in
        ("bytes_freed", INT64),
        ("preempted", INT64),  # requests
        ("recomputed_tokens", INT64),  # tokens that they had computed
        ("blocks_before", INT64),  # KV blocks of the pool
        ("blocks_after", INT64),
    ],
    align=True,
)
plan_changes_of = REPLICA.array("plan_changes", PLAN_CHANGE, rows=4)

RESIDENT_BYTES = np.dtype([("time_s", FLOAT64), ("weight_bytes", INT64)], align=True)
resident_bytes_log_of = REPLICA.array("resident_bytes_log", RESIDENT_BYTES, rows=16)

# -- what the running plan costs ---------------------------------------------------------------------------------------

# Blocks that an iteration runs, by the index of their precision: prefill MHA and FFN, decode MHA and FFN.
block_counts_of = REPLICA.array("block_counts", rows=lambda z: z.precisions, columns=4, saved=True)
LAYER = np.dtype(
    [
        ("bits_index", INT64),
        ("prefill_ffn", INT64),
        ("decode_ffn", INT64),
        ("kv_only", INT64),
        ("ffn_cut", INT64),  # eighths of the FFN block's channels that do not run
    ],
    align=True,
)
layers_of = REPLICA.array("layers", LAYER, rows=lambda z: z.layers, saved=True)
# What a layer holds of the decoding requests that keep only a part of their KV: how many requests, their bytes less the
# clock times token_bytes, and token_bytes, the bytes of one more token of each. Of these, how many hold hidden states,
# and their tokens less the clock for each. Bytes are those that decodes read.
LAYER_KV = np.dtype(
    [("decodes", INT64), ("bytes", INT64), ("token_bytes", INT64), ("hidden", INT64), ("hidden_tokens", INT64)],
    align=True,
)
layer_kv_of = REPLICA.array("layer_kv", LAYER_KV, rows=lambda z: z.layers, saved=True)
# Work space: what equal layers see of a batch, as ``sim.cost.latency_tables.layered_iteration_seconds`` reads it.
layer_loads_of = REPLICA.array("layer_loads", rows=lambda z: z.layers, columns=10)
# The ways to store the KV of a layer (sim.cost.kv_format.kv_precisions): tokens of a KV block, and bytes read of each.
KV_PRECISION = np.dtype([("block_tokens", INT64), ("token_bytes", INT64)], align=True)
kv_precisions_of = REPLICA.array("kv_precisions", KV_PRECISION, rows=lambda z: z.kv_precisions, saved=True)
latency_data_of = REPLICA.array("latency_data", FLOAT64)  # ``sim.cost.latency_tables.LatencyTables``
latency_layout_of = REPLICA.array("latency_layout")

# -- budget and scheduled decisions ------------------------------------------------------------------------------------

BUDGET_STEP = np.dtype([("from_s", FLOAT64), ("budget_bytes", INT64)], align=True)
budget_of = REPLICA.array("budget", BUDGET_STEP)
SCHEDULED = np.dtype([("at_s", FLOAT64), ("target", INT64)], align=True)  # scheduled decisions
schedule_of = REPLICA.array("schedule", SCHEDULED, rows=1, saved=True)

# -- the plan graph (sim/engine/plan_graph.py) -------------------------------------------------------------------------

RESIDENCY = np.dtype(
    [
        ("target", INT64),  # number of the wanted plan
        ("weight_bytes", INT64),  # bytes of resident weights
        ("kv_format_id", INT64),  # row of kv_format_tokens and kv_format_bits; -1 for all tokens at 16 bits
        ("kv_percent", INT64),  # of the bytes of a prompt's KV that stay after its prefill
        ("stream_id", INT64),  # number of what crosses the link in each iteration; -1 for nothing
        ("streams_at", INT64),  # first row of stream_bytes and stream_shares for it
        ("streams", INT64),  # streamed layers
        ("kv_only", INT64),  # layers in which only the last token of a prompt does more than write KV
        ("cuts_ffn", INT64),  # whether some FFN block runs at fewer channels
        ("max_waiting", INT64),  # -1 for no limit
        ("max_wait_s", FLOAT64),  # inf for no limit
        ("max_running", INT64),  # -1 for no limit
        ("prefill_params", INT64),  # parameters outside MHA blocks that run for a prompt token
        ("decode_params", INT64),  # parameters outside MHA blocks that run for a decoded token
        ("mha_params", INT64),  # parameters of an MHA block
        ("copies_at", INT64),  # first row of copies that lead to the target
        ("copies", INT64),  # how many copies lead there
        ("first_decision", INT64),  # first row of decisions met here; -1 for none
        ("first_price", INT64),  # first row of prices known here; -1 for none
    ],
    align=True,
)
residencies_of = REPLICA.array("residencies", RESIDENCY)
residency_words_of = REPLICA.array("residency_words", columns=1)  # 2 W columns: MHA blocks of prefill, of decode
residency_layers_of = REPLICA.array("residency_layers", LAYER, columns=1)  # one column per layer
residency_block_counts_of = REPLICA.array("residency_block_counts", columns=1)  # block_counts, flat

COPY = np.dtype(
    [
        ("layer", INT64),
        ("mha_bits", INT64),  # bits per weight of the MHA block that is copied; 0 for none
        ("ffn_bits", INT64),  # the same for the FFN block
        ("ffn_width", INT64),  # eighths of its channels after the copy
        ("bytes", INT64),  # bytes that are copied in
        ("net_bytes", INT64),  # these minus the bytes of the blocks they replace
        ("restores_mha", INT64),  # whether it restores an MHA block, of which running requests have no KV
        ("after", INT64),  # residency after the copy; -1 if not computed yet
    ],
    align=True,
)
copies_of = REPLICA.array("copies", COPY)
# Decisions and prices of a residency form linked lists: ``next`` is a row, -1 at the end.
DECISION = np.dtype([("target", INT64), ("after", INT64), ("next", INT64)], align=True)
decisions_of = REPLICA.array("decisions", DECISION)
PRICE = np.dtype([("next", INT64), ("prefill_nll", FLOAT64), ("decode_nll", FLOAT64)], align=True)
prices_of = REPLICA.array("prices", PRICE)
price_words_of = REPLICA.array("price_words", columns=1)  # W columns: the held set of MHA blocks
# How requests store KV after their prefill, a column per layer (sim.cost.kv_format): most tokens that it keeps, and the
# row of ``kv_precisions``.
kv_format_tokens_of = REPLICA.array("kv_format_tokens", columns=1)
kv_format_bits_of = REPLICA.array("kv_format_bits", columns=1)
# Streamed layers, as ``sim.cost.streaming.streamed_end_s`` reads them: the rows of one residency follow one another.
stream_bytes_of = REPLICA.array("stream_bytes")
stream_shares_of = REPLICA.array("stream_shares", FLOAT64, columns=2)


@compiled(inline=True)
def waiting(s: Table) -> int:
    """Return how many requests have arrived and wait."""
    n = counters_of(s)
    return int(n.preempted_waiting + n.queue_tail - n.queue_head)


@compiled(inline=True)
def admissible(s: Table) -> int:
    """Return how many of the waiting requests can be in the next batch."""
    n = counters_of(s)
    return int(n.preempted_waiting + max(min(n.queue_tail, n.late_from) - n.queue_head, 0))


@compiled(inline=True)
def idle(s: Table) -> bool:
    """Return whether no request runs, waits or is still to arrive, at a time of its own or after another."""
    n = counters_of(s)
    return bool(n.running + waiting(s) == 0 and n.arrived == n.request_count)


@compiled(inline=True)
def _has(words: Ints, row: int, layer: int) -> bool:
    """Return whether a layer is in the set of layers that a row of words holds."""
    return bool((words[row, layer // LAYERS_A_WORD] >> (layer % LAYERS_A_WORD)) & 1)
