"""The HTTP server: OpenAI's API in front of an engine that runs on its own thread.

app         routes, keys, request ids, errors          protocol  what clients may ask
prepare     messages and texts -> requests             replies   what they get
generation  one answer, collected or streamed          sse       the wire format of streams
output      deltas -> text, stop strings               metrics   what it cost
runner      the engine's thread and its mailboxes      faults    errors -> responses
lifecycle   bind, load, serve, drain
"""
