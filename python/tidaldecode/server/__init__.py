"""The HTTP server: `tidaldecode serve MODEL_DIR`, for clients of OpenAI's or
Anthropic's API.

A request's way: http_protocol.py and guard.py let it in, app.py finds its route, bodies.py checks
it, asking.py has it tokenised (text_workers.py) and submits it, feed.py hears the engine, and
chat.py, completions.py, messages.py or responses.py write what it says (event_stream.py).
service.py holds the model and says whether the server is loading, ready, draining or dead.
"""
