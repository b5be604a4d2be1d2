"""The other places where models live: fetched from there, sent there.

registry.example/me/tale:7b
  │
session      one registry: addresses, redirects, what is tried again
  ├ auth, keys, logins      who we are, if it asks
  └ peers, failures         where it may lead us; what breaks, as sentences
  │
  ├ pull     its manifest → the blobs that we lack → our manifest
  │   └ download, incoming             one blob, for all who want it; its bytes
  └ push     the blobs that it lacks → its manifest
      └ upload, outgoing               one blob; its bytes

beside: all of this happens in threads that whoever asked may leave.  ../parts: how a blob is cut.
"""

from refollama.store.registry.download import Downloads
from refollama.store.registry.pull import pull
from refollama.store.registry.push import push
from refollama.store.registry.session import Registry

__all__ = ["Downloads", "Registry", "pull", "push"]
