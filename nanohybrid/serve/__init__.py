"""The OpenAI-compatible server over the engine; started by `nanohybrid serve`, described in docs/serve.md."""
