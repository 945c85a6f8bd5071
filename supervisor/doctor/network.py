"""Can the scheduler be reached, with TLS when it is on, and is the worker's own port free?"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from datetime import UTC, datetime
from typing import Any, Final

from supervisor.config_parse import split_address
from supervisor.doctor.findings import Finding, Host
from supervisor.http_server import listen, why_not
from supervisor.settings import Settings

TIMEOUT_S: Final = 5.0
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What an HTTP/2 client says first: the preface and an empty SETTINGS frame (RFC 9113, 3.4)."""
SETTINGS_FRAME: Final = 4
FRAME_HEADER_BYTES: Final = 9
PORT_TODO: Final = "free it, or set WORKER_HTTP_ADDR to another (empty: off)"
ANY: Final = ("0.0.0.0", "::")  # noqa: S104  (on which a worker may listen)
LIVEZ: Final = b"ok\n"
CERTIFICATE_SOON_S: Final = 14 * 86400


def check_port(host: Host) -> list[Finding]:
    """WORKER_HTTP_ADDR."""
    address = host.settings.http_addr
    if not address:
        return [Finding("note", "port", "WORKER_HTTP_ADDR is empty: no health, metrics or status")]
    try:
        with listen(address):
            return [Finding("ok", "port", f"{address} is free")]
    except OSError as error:
        if _worker_answers(*split_address(address)):
            return [Finding("ok", "port", f"a worker answers at {address}")]
        return [Finding("warning", "port", f"{address} can't be listened on: {why_not(error)}", PORT_TODO)]


def _worker_answers(host: str, port: int) -> bool:
    """Whether it is a worker of ours that has this port."""
    connection = http.client.HTTPConnection(host if host not in ANY else "127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().read(16) == LIVEZ
    except (OSError, http.client.HTTPException):
        return False  # whoever it is, it is no worker that lives
    finally:
        connection.close()


def check_scheduler(host: Host) -> list[Finding]:
    """Each of SCHEDULER_ADDR and SCHEDULER_ADDRS. One that answers is enough to work."""
    findings = [_dial(host.settings, target) for target in host.settings.scheduler_targets]
    if any(finding.level in ("ok", "warning") for finding in findings):
        return [
            Finding("warning", finding.check, finding.what, finding.todo) if finding.level == "broken" else finding
            for finding in findings
        ]
    return findings


def _dial(settings: Settings, target: str) -> Finding:
    check = f"scheduler {target}"
    name, port = split_address(target)
    try:
        plain = socket.create_connection((name, port), TIMEOUT_S)
    except socket.gaierror as error:
        return Finding("broken", check, f"no such name: {error.strerror}", "check SCHEDULER_ADDR and the DNS")
    except OSError as error:
        todo = "is the scheduler up, and does a firewall or network policy let this host through?"
        return Finding("broken", check, f"can't be reached: {error.strerror or error}", todo)
    with contextlib.closing(plain):
        return _speak_tls(settings, check, name, plain) if settings.use_tls else _speak(check, plain, "in clear")


def _speak_tls(settings: Settings, check: str, name: str, plain: socket.socket) -> Finding:
    try:
        context = ssl.create_default_context(cafile=settings.scheduler_ca_file)
        context.set_alpn_protocols(["h2"])
        if settings.scheduler_client_cert_file is not None:
            context.load_cert_chain(settings.scheduler_client_cert_file, settings.scheduler_client_key_file)
    except (OSError, ssl.SSLError) as error:
        todo = "check SCHEDULER_CA_FILE, SCHEDULER_CLIENT_CERT_FILE and SCHEDULER_CLIENT_KEY_FILE"
        return Finding("broken", check, f"the certificates can't be used: {error}", todo)
    try:
        with context.wrap_socket(plain, server_hostname=name) as secure:
            if secure.selected_alpn_protocol() != "h2":
                return Finding("broken", check, "TLS, but no HTTP/2 in ALPN", "a proxy in between must pass HTTP/2 on")
            words = f"{secure.version()}{', with a client certificate' if settings.scheduler_client_cert_file else ''}"
            return _certificate_soon(check, secure.getpeercert()) or _speak(check, secure, words)
    except ssl.SSLCertVerificationError as error:
        todo = "set SCHEDULER_CA_FILE to the CA that signed it, and dial the name that it is made out to"
        return Finding("broken", check, f"its certificate does not hold: {error.verify_message}", todo)
    except (OSError, ssl.SSLError) as error:
        todo = "does it speak TLS at all, and does it ask for a client certificate?"
        return Finding("broken", check, f"no TLS: {error.strerror or error}", todo)


def _certificate_soon(check: str, certificate: dict[str, Any] | None) -> Finding | None:
    if not certificate or "notAfter" not in certificate:
        return None
    left = ssl.cert_time_to_seconds(certificate["notAfter"]) - datetime.now(UTC).timestamp()
    if left > CERTIFICATE_SOON_S:
        return None
    return Finding("warning", check, f"its certificate expires in {left / 86400:.1f} days", "have it renewed")


def _speak(check: str, connection: socket.socket, words: str) -> Finding:
    """Whether HTTP/2 is spoken: a server's first frame is SETTINGS."""
    try:
        connection.settimeout(TIMEOUT_S)
        connection.sendall(PREFACE)
        said = b""
        while len(said) < FRAME_HEADER_BYTES and (more := connection.recv(FRAME_HEADER_BYTES - len(said))):
            said += more
    except TimeoutError:
        said = b""
    except OSError as error:
        todo = "a TLS port dialed without USE_TLS does this, and so does a proxy without a backend"
        return Finding("broken", check, f"it hung up: {error.strerror or error}", todo)
    if len(said) == FRAME_HEADER_BYTES and said[3] == SETTINGS_FRAME:
        return Finding("ok", check, f"answers HTTP/2 {words}")
    todo = "is this the scheduler's gRPC port? A TLS port needs USE_TLS=true"
    return Finding("broken", check, f"something listens that speaks no HTTP/2 ({words})", todo)
