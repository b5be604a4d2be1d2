"""HTTP IN AND OUT. `serve(host, port)` runs until it is told to stop."""

from refollama.server.run import serve

__all__ = ["serve"]
