"""One model over HTTP: an OpenAI-compatible server with one page, and what measures it."""
