"""An OpenAI-compatible server over the real engine."""
