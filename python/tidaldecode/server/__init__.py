"""The HTTP server: `tidaldecode serve MODEL_DIR`, for the clients of OpenAI's API.

A request's way: protocol.py (http_protocol.py, guard.py) lets it in, app.py finds its route,
bodies.py checks it, asking.py has it tokenised (text_workers.py) and submits it, feed.py hears the
engine, and chat.py or completions.py write what it says (event_stream.py). service.py holds the
model and says whether the server is loading, ready, draining or dead.
"""
