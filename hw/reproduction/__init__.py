"""Published figures side by side with what this project computes for the same setting: docs/results/reproduction."""
