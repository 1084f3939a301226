"""Server for an engine: HTTP routes with OpenAI's protocol, the engine's own process, and load tests."""
