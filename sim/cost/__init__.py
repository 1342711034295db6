"""What a plan costs: model shape, GPU, bytes, seconds and quality, each a pure function of the plan."""
