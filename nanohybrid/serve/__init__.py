"""The server: an OpenAI-compatible API over the engine. `nanohybrid serve` starts it; docs/serve.md tells how it is used."""
