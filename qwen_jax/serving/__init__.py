"""HTTP: OpenAI's protocol, streaming, limits, metrics."""
