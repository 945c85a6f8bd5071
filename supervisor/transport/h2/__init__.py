"""The stream over the `h2` library and asyncio: the same wire as grpcio's, at a fraction of its cost.

Owns: gRPC over HTTP/2 for one bidirectional call per connection. `h2` keeps the state of HTTP/2 (RFC 9113); what gRPC
makes of it is here.

- `dial.py` connects, with TLS or without, and opens the one stream.
- `stream.py` is the asyncio protocol behind the session's stream: flow control both ways, keepalive, the end.
- `frames.py` cuts what arrives into HTTP/2 frames, `inbox.py` cuts their payload into messages.
- `statuses.py` says which gRPC status an answer, a reset or a GOAWAY means.
"""
