"""Where a registry may send us: never from a public address to one inside a house.

Who makes us fetch an address of their choice could otherwise read what only this machine can
reach. Whether an address is private is looked up when the connection stands, since a name may
mean another address each time that it is asked for.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import httpx

from refollama.errors import Abandoned, RegistryError

Watch = Callable[[str, dict[str, Any]], None]


class Peers:
    """The addresses that one registry may lead to: any, as long as all of its own are private."""

    def __init__(self, host: str) -> None:
        self._host = host
        # None until the first connection; behind a proxy, which looks names up itself, for ever.
        self._private: bool | None = True if names_private(host) else None
        self._lock = threading.Lock()
        self._ended = False
        self._sockets: WeakSet[socket.socket] = WeakSet()

    def check(self, host: str) -> None:
        """Before anything is sent: by the name alone.  Raises: RegistryError."""
        if not self._private and names_private(host):
            raise self._refusal(host)

    def hang_up(self) -> None:
        """End all connections: who waits for one is woken, which closing it would not do.

        One that is only now being made is closed as soon as it stands.
        """
        with self._lock:
            self._ended = True
            open_ones = list(self._sockets)
        for one in open_ones:
            with suppress(OSError):  # closed already
                one.shutdown(socket.SHUT_RDWR)

    def watch(self, url: httpx.URL) -> Watch:
        """What httpx shall tell of a request: each new connection is looked at before its use."""
        wanted = url.raw_host.decode("ascii")
        asked = ""

        def see(event: str, info: dict[str, Any]) -> None:
            nonlocal asked
            if event.endswith("connect_tcp.started"):
                asked = info["host"]
            elif event.endswith("connect_tcp.complete") and asked == wanted:  # else a proxy's
                self._meet(url.host, info["return_value"])
            if event.endswith(("connect_tcp.complete", "start_tls.complete")):
                self._remember(info["return_value"])

        return see

    def _remember(self, stream: Any) -> None:
        with self._lock:
            if not self._ended:
                self._sockets.add(stream.get_extra_info("socket"))
                return
        stream.close()  # the pool has forgotten it, and would leave it open
        raise Abandoned("the transfer has ended")

    def _meet(self, host: str, stream: Any) -> None:
        private = is_private(stream.get_extra_info("server_addr")[0])
        if host == self._host and self._private is not False:  # once public, always public
            self._private = private
        if private and not self._private:
            stream.close()
            raise self._refusal(host)

    def _refusal(self, host: str) -> RegistryError:
        return RegistryError(f"{self._host} leads to {host}, which is a private address: refused")


def names_private(host: str) -> bool:
    """Does the text alone say that it is this machine, or one of its neighbours?"""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return is_private(name)
    with suppress(OSError):  # 127.1 and 0x7f000001 are addresses too
        return is_private(socket.inet_ntoa(socket.inet_aton(name)))
    return False


def is_private(address: str) -> bool:
    """Loopback, link-local, private, or otherwise not on the public net.  Raises: ValueError."""
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return not (mapped or ip).is_global
