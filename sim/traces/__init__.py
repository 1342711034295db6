"""Traces: arrivals and lengths of requests.

Every module is public: `trace` (`Trace`, the value), `transforms` (cut, scale, add a burst), `generate` (synthetic
traces), `fit` (a generator's parameters from a trace) and `readers` (published formats, one file each).
"""
