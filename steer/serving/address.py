"""Where a server listens, as vLLM's flags say it, and whether it answers there: over TCP or a Unix socket, with TLS."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steer.serving import flags as vllm_flags

TIMEOUT = 2.0  # seconds


class Address(NamedTuple):
    """Where a server listens. `path` is that of a Unix socket, which it has instead of a host and a port."""

    host: str
    port: int
    tls: bool = False
    path: str | None = None

    @property
    def url(self) -> str:
        """The URL for clients; for a Unix socket, that of any host."""
        scheme, host = "https" if self.tls else "http", f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://localhost" if self.path else f"{scheme}://{host}:{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else self.url


def address_of(flags: Sequence[str], host: str, port: int) -> Address:
    """The address of a server with these flags for vLLM."""
    # A certificate file may hold its key too, so that --ssl-keyfile may be missing.
    tls = vllm_flags.value_of(flags, "--ssl-certfile", "--ssl-certf") is not None
    return Address(host, port, tls, vllm_flags.value_of(flags, "--uds", "--ud"))


def problems_of_flags(flags: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Flags for vLLM with which `steer serve` would wait forever, and such environment variables."""
    problems = [
        f"{name} {values[-1]} is given to vLLM: give it to steer serve, before --"
        for name, shortest in (("--host", "--ho"), ("--port", "--por"))
        if (values := vllm_flags.taken(flags, name, shortest)[1])
    ]
    problems += [
        f"{name} starts no HTTP server that steers: {why}"
        for name, shortest, why in (
            ("--headless", "--hea", "it is for further machines of a deployment, which need no steer serve"),
            ("--grpc", "--grpc", "gRPC answers carry no receipts"),
        )
        if vllm_flags.has(flags, name, shortest)
    ]
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        problems.append("VLLM_USE_RUST_FRONTEND is set, and that front end loads no plugins: unset it")
    return problems


def answers(address: Address) -> bool:
    """Whether the server answers GET /health. Its certificate is not verified: nothing secret is sent."""
    connection = _Connection(address)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (ssl.SSLError, ConnectionError) as error:
        # A server that wants a certificate of its clients (--ssl-cert-reqs) ends the handshake, or in TLS 1.3 the
        # connection after it, with an alert, which may be lost when it closes. That is an answer too.
        return connection.secured or "ALERT" in (getattr(error, "reason", None) or "")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class _Connection(http.client.HTTPConnection):
    """A connection to this machine: no proxy of the environment is asked."""

    def __init__(self, address: Address) -> None:
        super().__init__("localhost" if address.path else address.host, address.port, timeout=TIMEOUT)
        self.address = address
        self.secured = False  # whether a TLS handshake has succeeded; http.client forgets the socket when it fails

    def connect(self) -> None:
        """Open the socket."""
        if self.address.path:
            plain = self.sock = socket.socket(socket.AF_UNIX)
            plain.settimeout(TIMEOUT)
            plain.connect(self.address.path)
        else:
            plain = socket.create_connection((self.address.host, self.address.port), TIMEOUT)
        self.sock = plain
        if self.address.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self.sock = context.wrap_socket(plain)
            self.secured = True
