"""Compression of a prompt's KV as other systems publish it: what each method chooses, and how that lies in KV blocks.

ada_kv     Ada-KV: tokens chosen in each head by attention, with a budget that the heads of a layer share
think      ThinK: channels of the keys that queries use least are dropped
lorc       LoRC: keys and values in the first singular directions of their weights
refree_kv  ReFreeKV: the middle of the prompt is dropped until attention has lost a share of its norm

``prompt_kv`` is what a prompt leaves in a layer, and what a method stores of it. ``packing`` puts that into the first
token slots of the layer, for the engine (hw/elastic/compressed_kv.py); ``hw.score.kv_compression`` measures the loss.
"""
