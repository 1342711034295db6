"""A Hugging Face model that takes plans: blocks, KV cache, quantized layers, weight copies."""
