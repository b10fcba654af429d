"""The limits of a connection before its request's caller is known. Each limit has a test on a real socket."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from api.admission import DOWNLOADS
from api.connections import MAX_HEADER_BYTES, MAX_HEADERS, MAX_PIPELINED, MAX_URL_BYTES
from local.ports import free_ports
from local.servers import ServerAddresses
from tests.databases import Database
from tests.factories.tenants import Tenant
from tests.processes import running_api
from tests.waiting import repeat_until, wait_until

MAX_CONNECTIONS = 20
GET = b"GET /livez HTTP/1.1\r\nhost: x\r\n"
BEGUN = GET + b"x-a: b"
SLOW_BYTES = 8192  # at a time: some 100 KB a second
Connect = Callable[[], socket.socket]


@pytest.fixture(scope="module")
def url(database: Database, servers: ServerAddresses) -> Iterator[str]:
    """A process of little patience."""
    (port,) = free_ports(1)
    env = {"ESPALIER_HEADER_SECONDS": "2", "ESPALIER_BODY_SECONDS": "2"}
    with running_api(database.api_url, servers.storage, port=port, env=env):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def small_url(database: Database, servers: ServerAddresses) -> Iterator[str]:
    """A process of few connections."""
    (port,) = free_ports(1)
    env = {"ESPALIER_MAX_CONNECTIONS": str(MAX_CONNECTIONS), "ESPALIER_HEADER_SECONDS": "300"}
    with running_api(database.api_url, servers.storage, port=port, env=env):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    with connecting_to(url) as connect:
        yield connect


@pytest.fixture
def connect_to_small(small_url: str) -> Iterator[Connect]:
    with connecting_to(small_url) as connect:
        yield connect


@contextlib.contextmanager
def connecting_to(url: str) -> Iterator[Connect]:
    address = urlsplit(url)
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=60))


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            answer += piece
    return answer


def pour(connection: socket.socket, piece: bytes, *, most: int) -> int:
    """Send a piece again and again, and return how many bytes were taken until the other side had enough."""
    num_bytes = 0
    with contextlib.suppress(ConnectionError):
        while num_bytes < most:
            connection.sendall(piece)
            num_bytes += len(piece)
            readable, _, _ = select.select([connection], [], [], 0)
            if readable:
                break
    return num_bytes


def address_of(answer: httpx.Response) -> object:
    """Return by which connection a client was answered."""
    assert answer.is_success
    return answer.extensions["network_stream"].get_extra_info("client_addr")


def is_answered(url: str) -> bool:
    return httpx.get(f"{url}/livez", trust_env=False, timeout=60).is_success


@pytest.mark.parametrize(
    "beginning",
    [GET + b"x-endless: ", b"GET /", b"GET / HTTP/1.1\r\nx-", b"\r\n"],
    ids=["value", "url", "name", "empty lines"],
)
def test_an_endless_header_is_cut_off_and_others_are_answered(url: str, connect: Connect, beginning: bytes) -> None:
    made = connect()
    made.sendall(beginning)
    piece = b"\r\n" * 500 if beginning == b"\r\n" else b"a" * 1000
    assert pour(made, piece, most=2**26) < 2**26
    assert read_all(made)[:12] in {b"HTTP/1.1 431", b"HTTP/1.1 414", b""}  # the last where bytes were under way
    assert is_answered(url)


def test_a_header_up_to_the_caps_is_taken(connect: Connect) -> None:
    made = connect()
    fields = b"".join(b"x-%d: %s\r\n" % (number, b"v" * 600) for number in range(MAX_HEADERS - 2))
    made.sendall(GET + b"connection: close\r\n" + fields + b"\r\n")
    assert read_all(made).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GET + b"x: y\r\n" * 10_000 + b"\r\n", b"431"),
        (GET + b"x: y\r\n" * (MAX_HEADERS + 1) + b"\r\n", b"431"),
        (GET + b"x: " + b"y" * MAX_HEADER_BYTES + b"\r\n\r\n", b"431"),
        (b"GET /" + b"a" * MAX_URL_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"414"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
    ids=["10,000 fields", "a field too many", "a long field", "a long URL", "no HTTP"],
)
def test_what_passes_a_cap_is_told_so_and_closed(connect: Connect, request_: bytes, status: bytes) -> None:
    made = connect()
    made.sendall(request_)
    answer = read_all(made)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b'"error"' in answer


def has_news(made: socket.socket) -> bool:
    """Return whether something can be read, or the end."""
    return bool(select.select([made], [], [], 0)[0])


@pytest.mark.parametrize("tail", [b"0\r\nx-trailer: ", b"5;extension="], ids=["trailer", "chunk extension"])
def test_what_stands_around_a_body_is_bounded_like_a_header(url: str, connect: Connect, tail: bytes) -> None:
    made = connect()
    made.sendall(b"POST /livez HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + tail)
    with pytest.raises(ConnectionError):
        repeat_until(lambda: False, lambda: made.sendall(b"a" * 1000))
    assert is_answered(url)


@pytest.mark.parametrize("sent", [b"", b"\r\n", BEGUN], ids=["nothing", "an empty line", "half a header"])
def test_a_connection_that_never_asks_is_closed(connect: Connect, sent: bytes) -> None:
    made = connect()
    made.sendall(sent)
    answer = read_all(made)
    assert answer.startswith(b"HTTP/1.1 408") if sent == BEGUN else answer == b""


def test_a_header_that_trickles_is_given_up(connect: Connect) -> None:
    made = connect()
    made.sendall(BEGUN)
    with contextlib.suppress(ConnectionError):
        repeat_until(lambda: has_news(made), lambda: made.sendall(b"c"))
    assert read_all(made).startswith(b"HTTP/1.1 408")


def test_a_served_connection_that_trickles_empty_lines_is_closed(connect: Connect) -> None:
    made = connect()
    made.sendall(GET + b"\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += made.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200")
    with contextlib.suppress(ConnectionError):
        repeat_until(lambda: has_news(made), lambda: made.sendall(b"\r\n"))
    assert read_all(made) == b""


@pytest.mark.parametrize(
    "request_line",
    [b"POST /v1/fine_tuning/jobs HTTP/1.1\r\ncontent-type: application/json\r\n", b"POST /v1/files HTTP/1.1\r\n"],
    ids=["read whole", "streamed"],
)
def test_a_body_that_trickles_is_given_up(connect: Connect, tenant: Tenant, request_line: bytes) -> None:
    made = connect()
    form = b"content-type: multipart/form-data; boundary=b\r\n" if b"files" in request_line else b""
    key = f"authorization: Bearer {tenant.api_key}\r\n".encode()
    made.sendall(request_line + form + key + b"host: x\r\ncontent-length: 100000\r\n\r\n--b\r\n")
    with contextlib.suppress(ConnectionError):
        repeat_until(lambda: has_news(made), lambda: made.sendall(b"c"))
    answer = read_all(made)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_stalled" in answer


@pytest.fixture
def content_url(url: str, tenant: Tenant) -> str:
    """The path of a file that no buffer holds."""
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    form = {"files": {"file": ("a.jsonl", row * (2**24 // len(row)))}, "data": {"purpose": "fine-tune"}}
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    answer = httpx.post(f"{url}/v1/files", headers=headers, trust_env=False, timeout=60, **form)  # type: ignore[arg-type]
    return f"/v1/files/{answer.json()['id']}/content"


def ask_for(path: str, tenant: Tenant) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {tenant.api_key}\r\n\r\n".encode()


def test_who_does_not_read_an_answer_does_not_keep_its_place(
    url: str, connect: Connect, tenant: Tenant, content_url: str
) -> None:
    headers = {"authorization": f"Bearer {tenant.api_key}"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
        for _ in range(DOWNLOADS.of_tenant):
            asking = connect()
            asking.sendall(ask_for(content_url, tenant))
            assert asking.recv(12) == b"HTTP/1.1 200"
        assert client.get(content_url).status_code == 429
        wait_until(lambda: client.get(content_url).is_success)


def is_held(made: socket.socket) -> bool:
    """Return whether the server's side of a connection is open, whatever the system still sends for it."""
    ends = made.getpeername()[1], made.getsockname()[1]
    open_ = [each for each in psutil.net_connections(kind="tcp") if each.raddr and each.status == "ESTABLISHED"]
    return ends in [(each.laddr.port, each.raddr.port) for each in open_]


def test_who_reads_slowly_and_steadily_reads_on(url: str, tenant: Tenant, content_url: str) -> None:
    address = urlsplit(url)
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**15)
        made.settimeout(60)
        made.connect((address.hostname, address.port))
        made.sendall(ask_for(content_url, tenant))
        num_read = 0

        def read() -> None:
            nonlocal num_read
            assert is_held(made), "the server has not closed it"
            piece = made.recv(SLOW_BYTES)
            assert piece
            num_read += len(piece)

        repeat_until(lambda: num_read >= 100 * SLOW_BYTES, read)


def test_without_a_key_no_body_is_waited_for(connect: Connect) -> None:
    made = connect()
    head = b"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    made.sendall(head + b"content-length: 1000000\r\n\r\n{")
    assert made.recv(65536).startswith(b"HTTP/1.1 401")


def test_pipelined_requests_are_answered_in_order_and_a_flood_of_them_is_not(url: str, connect: Connect) -> None:
    made = connect()
    made.sendall((GET + b"\r\n") * (MAX_PIPELINED - 1) + GET + b"connection: close\r\n\r\n")
    assert read_all(made).count(b"HTTP/1.1 200") == MAX_PIPELINED
    flooding = connect()
    pour(flooding, (GET + b"\r\n") * 5000, most=2**20)
    assert read_all(flooding).count(b"HTTP/1.1 200") <= 1
    assert is_answered(url)


def test_half_open_connections_shut_nobody_out(small_url: str, connect_to_small: Connect) -> None:
    with httpx.Client(base_url=small_url, trust_env=False, timeout=60) as working:
        own = address_of(working.get("/livez"))
        half_open = [connect_to_small() for _ in range(5 * MAX_CONNECTIONS)]
        for each in half_open:
            with contextlib.suppress(ConnectionError):
                each.sendall(BEGUN)
            assert address_of(working.get("/livez")) == own, "its connection is kept"
        assert is_answered(small_url), "a newcomer gets in"
    closed = [each for each in half_open if select.select([each], [], [], 0)[0]]
    assert len(closed) >= 4 * MAX_CONNECTIONS - 1


def test_while_all_are_at_work_a_newcomer_is_told_and_those_at_work_are_served(
    small_url: str, connect_to_small: Connect, tenant: Tenant
) -> None:
    head = f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {tenant.api_key}\r\n".encode()
    body = b'{"model": "no such"' + b" " * 20_000 + b"}"
    at_work = [connect_to_small() for _ in range(MAX_CONNECTIONS)]
    for each in at_work:
        each.sendall(head + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:-1])
    answers: list[bytes] = []

    def is_refused() -> bool:
        answers.append(read_all(connect_to_small()))
        return answers[-1].startswith(b"HTTP/1.1 503")

    wait_until(is_refused)  # all of them have been looked at
    assert b"retry-after: 2" in answers[-1]
    for each in at_work:
        each.sendall(b"}")
    assert all(each.recv(65536).startswith(b"HTTP/1.1 4") for each in at_work)
    assert is_answered(small_url)


def test_an_upgrade_opens_no_other_door(connect: Connect) -> None:
    made = connect()
    made.sendall(GET + b"connection: upgrade, close\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\r\n")
    assert made.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/files"], ids=["read whole", "streamed"])
def test_a_body_that_does_not_end_does_not_hold_up_the_end_of_the_api(
    database: Database, servers: ServerAddresses, tenant: Tenant, path: str
) -> None:
    (port,) = free_ports(1)
    with (
        running_api(database.api_url, servers.storage, port=port, env={"ESPALIER_BODY_SECONDS": "5"}) as api,
        connecting_to(f"http://127.0.0.1:{port}") as connect,
    ):
        made = connect()
        made.sendall(
            f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {tenant.api_key}\r\n"
            "content-type: multipart/form-data; boundary=b\r\ncontent-length: 100\r\n"
            "expect: 100-continue\r\n\r\n".encode()
        )
        assert made.recv(12) == b"HTTP/1.1 100", "its body is waited for"
        api.terminate()
        wait_until(lambda: api.poll() is not None, what="the end")
