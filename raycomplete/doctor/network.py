"""Ports and tokens: who listens where, and what lets strangers in."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from raycomplete.config import ServeConfig
from raycomplete.doctor.findings import Context, Finding, fail, ok, warn
from raycomplete.runtime.errors import ConfigError

_RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs", 10001: "Ray's clients"}
_GENERATE = "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token"


def check_ports(context: Context) -> Finding:
    """Ray's ports and the service's: free, or used by whom."""
    serve = context.config.serve if context.config else ServeConfig()
    ports = {**_RAY_PORTS, serve.port: "raycomplete serve"}
    used = {port: owner for port in ports if (owner := port_user(port)) is not None}
    values = {str(port): {"for": ports[port], "used_by": used.get(port)} for port in ports}
    if not used:
        return ok(f"Free: {', '.join(map(str, ports))}.", ports=values)
    words = "; ".join(f"{port} ({ports[port]}) is used by {owner}" for port, owner in used.items())
    remedies = []
    if serve.port in used:
        remedies.append(f"choose another serve.port than {serve.port}, or end that process")
    if used.keys() - {serve.port}:
        remedies.append("a second `ray start --head` here needs other ports; a local run is not affected")
    remedy = "; ".join(remedies)
    return warn(f"{words}.", f"{remedy[:1].upper()}{remedy[1:]}.", ports=values)


def check_ray_token(context: Context) -> Finding:
    """Whether Ray asks everyone for its token, and whether only we can read it."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    token, file = ray_token()
    values = {"mode": mode or "default", "token": token, "file": str(file) if file else None}
    shared = context.address is not None
    if mode not in ("", "token", "k8s"):
        words = f"RAY_AUTH_MODE is {mode!r}: whoever reaches Ray's ports runs code here."
        return fail(words, f"Unset RAY_AUTH_MODE, then {_GENERATE}.", **values)
    if file is not None and (bits := stat.S_IMODE(file.stat().st_mode)) & 0o077:
        words = f"Other users may read Ray's token {file} (mode {bits:04o})."
        return (fail if shared else warn)(words, f"chmod 600 {file}", **values, file_mode=f"{bits:04o}")
    if mode == "token" and not token:
        if shared:
            words = "RAY_AUTH_MODE is 'token', and there is no token."
            return fail(words, "Copy the cluster's ~/.ray/auth_token to this machine, with mode 0600.", **values)
        return ok("Ray makes a token when a local cluster starts.", **values)
    if shared and mode == "" and not token:  # Ray turns authentication on by itself where it finds a token
        return warn(
            f"A cluster is named ({context.address}), and there is neither RAY_AUTH_MODE nor a token to send to it.",
            f"export RAY_AUTH_MODE=token on every node and here; a token: {_GENERATE}.",
            **values,
        )
    if not token:
        return ok("Token authentication is on; Ray makes a token when a local cluster starts.", **values)
    where = f"in {file}, readable by its owner only" if file else "in RAY_AUTH_TOKEN"
    return ok(f"Token authentication is on; the token is {where}.", **values)


def check_service_token(context: Context) -> Finding:
    """Whether `raycomplete serve` would start: beyond this machine it needs a token."""
    from raycomplete.serving.token import is_loopback, read_token_digest

    serve = context.config.serve if context.config else ServeConfig()
    values = {"host": serve.host, "port": serve.port}
    try:
        token = read_token_digest(serve)
    except ConfigError as error:
        return fail(error.problem, error.remedy, **values)
    if serve.token_file is not None:
        bits = stat.S_IMODE(Path(serve.token_file).expanduser().stat().st_mode)
        if bits & 0o077:
            words = f"Other users may read the token file {serve.token_file} (mode {bits:04o})."
            return fail(words, f"chmod 600 {serve.token_file}", **values)
    place = "this machine only" if is_loopback(serve.host) else "the network"
    if token is None:
        return ok(f"The service would listen on {serve.host} ({place}), where it needs no token.", **values)
    return ok(f"The service would listen on {serve.host} ({place}) and ask for the token.", **values)


def ray_token() -> tuple[bool, Path | None]:
    """Whether Ray would find a token, and the file it would find it in; looked up as Ray does."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True, None
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path).expanduser() if path else Path.home() / ".ray" / "auth_token"
    return (True, file) if file.is_file() else (False, None)


def port_user(port: int) -> str | None:
    """Who listens on a port of this machine; None where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind(("", port))
        except OSError:
            return _listener(port) or "another process"
    return None


def _listener(port: int) -> str | None:
    try:
        import psutil

        for connection in psutil.net_connections(kind="tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    return None  # another user's
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except Exception:  # psutil missing, or not allowed to look
        return None
    return None
