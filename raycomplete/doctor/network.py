"""Checks of ports and tokens: who listens where, and what lets strangers in."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from raycomplete.config import ServeConfig
from raycomplete.doctor.findings import Context, Finding, fail, ok, warn
from raycomplete.runtime.errors import ConfigError

_RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs", 10001: "Ray's clients"}
_GENERATE = "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token"


def check_ports(context: Context) -> Finding:
    """Checks that Ray's ports and the service's are free, or says who uses them."""
    serve = _serve(context)
    ports = {**_RAY_PORTS, serve.port: "raycomplete serve"}
    used = {port: owner for port in ports if (owner := port_user(port)) is not None}
    values = {str(port): {"for": ports[port], "used_by": used.get(port)} for port in ports}
    if not used:
        return ok(f"Free: {', '.join(map(str, ports))}.", ports=values)
    words = "; ".join(f"{port} ({ports[port]}) is used by {owner}" for port, owner in used.items())
    remedies = [f"choose another serve.port than {serve.port}, or end that process"] if serve.port in used else []
    if used.keys() - {serve.port}:
        remedies.append("a second `ray start --head` here needs other ports; a local run is not affected")
    remedy = "; ".join(remedies)
    return warn(f"{words}.", f"{remedy[:1].upper()}{remedy[1:]}.", ports=values)


def check_ray_token(context: Context) -> Finding:
    """Checks that Ray asks everyone for its token, and that only we can read it."""
    mode, shared = os.environ.get("RAY_AUTH_MODE", "").lower(), context.address is not None
    token, file = ray_token()
    values = {"mode": mode or "default", "token": token, "file": str(file) if file else None}
    if mode not in ("", "token", "k8s"):
        words = f"RAY_AUTH_MODE is {mode!r}: whoever reaches Ray's ports runs code here."
        return fail(words, f"Unset RAY_AUTH_MODE, then {_GENERATE}.", **values)
    if file is not None and (bits := _open_mode(file)):
        words = f"Other users may read Ray's token {file} (mode {bits})."
        return (fail if shared else warn)(words, f"chmod 600 {file}", **values, file_mode=bits)
    if token:
        where = f"in {file}, readable by its owner only" if file else "in RAY_AUTH_TOKEN"
        return ok(f"Token authentication is on; the token is {where}.", **values)
    if mode == "token" and shared:
        remedy = "Copy the cluster's ~/.ray/auth_token to this machine, with mode 0600."
        return fail("RAY_AUTH_MODE is 'token', and there is no token.", remedy, **values)
    if mode == "" and shared:  # Ray turns authentication on by itself where it finds a token
        return warn(
            f"A cluster is named ({context.address}), and there is neither RAY_AUTH_MODE nor a token to send to it.",
            f"export RAY_AUTH_MODE=token on every node and here; a token: {_GENERATE}.",
            **values,
        )
    return ok("Token authentication is on; Ray makes a token when a local cluster starts.", **values)


def check_service_token(context: Context) -> Finding:
    """Checks that `raycomplete serve` would start: beyond this machine it needs a token."""
    from raycomplete.serving.token import is_loopback, read_token_digest

    serve = _serve(context)
    values = {"host": serve.host, "port": serve.port}
    try:
        token = read_token_digest(serve)
    except ConfigError as error:
        return fail(error.problem, error.remedy, **values)
    if serve.token_file is not None and (bits := _open_mode(Path(serve.token_file).expanduser())):
        words = f"Other users may read the token file {serve.token_file} (mode {bits})."
        return fail(words, f"chmod 600 {serve.token_file}", **values)
    place = "this machine only" if is_loopback(serve.host) else "the network"
    asks = ", where it needs no token" if token is None else " and ask for the token"
    return ok(f"The service would listen on {serve.host} ({place}){asks}.", **values)


def ray_token() -> tuple[bool, Path | None]:
    """Tells whether Ray would find a token, and the file it would find it in; looked up as Ray does."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True, None
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()
    return (True, file) if file.is_file() else (False, None)


def port_user(port: int) -> str | None:
    """Names who listens on a port of this machine; None where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        with suppress(OSError):
            probe.bind(("", port))
            return None
    with suppress(Exception):  # psutil missing, or not allowed to look
        import psutil

        for connection in psutil.net_connections(kind="tcp"):
            is_it = connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
            if is_it and connection.pid is not None:  # None: another user's
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"


def _serve(context: Context) -> ServeConfig:
    return context.config.serve if context.config else ServeConfig()


def _open_mode(file: Path) -> str | None:
    """Returns the permissions of a file that others may read; None where only its owner can."""
    bits = stat.S_IMODE(file.stat().st_mode)
    return f"{bits:04o}" if bits & 0o077 else None
