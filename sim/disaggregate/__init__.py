"""Prefill and decode on separate replicas, with KV caches sent between them."""
