"""The OpenAI-compatible HTTP server over the engine. `app.py` is its surface, `async_engine.py` its way to the GPU."""
