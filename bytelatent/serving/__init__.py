"""A model behind HTTP: the API, the thread that owns the engine, and the page at `/`."""
