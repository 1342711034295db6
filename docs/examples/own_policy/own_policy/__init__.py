"""A policy in a package of its own."""
