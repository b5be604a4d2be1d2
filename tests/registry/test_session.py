"""One registry: what is sent, where it may lead us, and what its failures become."""

import datetime
import gzip
import ipaddress
import itertools
import socket
import ssl
import sys
import threading
import time

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from refollama.errors import (
    Abandoned,
    BadRequest,
    Passing,
    RefollamaError,
    RegistryError,
    StoreError,
    Unauthorized,
)
from refollama.store.name import Name, scheme_of
from refollama.store.registry import failures, peers, session
from refollama.store.registry.session import Registry, retried
from tests.registry.desk import hello, open_desk, registry_at


def read(registry, url="manifests/latest", method="GET", **more):
    return registry.read(method, url, limit=1000, **more)


@pytest.fixture
def desk():
    with open_desk(hello) as one:
        yield one


# -------------------------------------------------------------------- names and schemes


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("llama2", "https"),
        ("http://h/n/m", "http"),
        ("HTTP://h/n/m", "http"),
        ("https://h/n/m", "https"),
    ],
)
def test_a_name_may_carry_its_scheme(text, scheme):
    assert scheme_of(text) == scheme


def test_another_scheme_is_no_name():
    with pytest.raises(BadRequest, match="scheme"):
        scheme_of("ftp://h/n/m")


def test_http_must_be_wanted():
    name = Name.parse("http://h.example/n/m")
    with pytest.raises(BadRequest, match="^insecure protocol http$"):
        Registry(name, scheme="http")
    Registry(name, scheme="http", insecure=True).close()


@pytest.mark.parametrize("host", ["h:99999", "h:0", "a" * 64 + ".example"])
def test_a_host_that_cannot_be_is_refused_at_once(host):
    with pytest.raises(BadRequest, match="no address of a registry"):
        registry_at(host)


# -------------------------------------------------------------------- what is sent


def test_requests_are_ollamas(desk):
    with registry_at(desk.host) as registry:
        status, _, body = read(registry, "blobs/sha256:00", headers={"Range": "bytes=1-2"})
    assert (status, body) == (200, b"hello")
    (seen,) = desk.seen
    assert seen.target == "/v2/me/tale/blobs/sha256:00"
    assert seen.headers["host"] == desk.host
    assert seen.headers["accept-encoding"] == "identity"
    assert seen.headers["range"] == "bytes=1-2"
    assert seen.headers["user-agent"].startswith("ollama/")
    assert f" {sys.platform}) " in seen.headers["user-agent"]
    assert "authorization" not in seen.headers


def test_an_absolute_address_is_taken_as_it_is(desk):
    url = f"http://{desk.host}/v2/me/tale/blobs/uploads/7?_state=a%2Fb%3D%3D"
    with registry_at(desk.host) as registry:
        read(registry, url, "PATCH", content=b"x")
    assert desk.targets() == ["/v2/me/tale/blobs/uploads/7?_state=a%2Fb%3D%3D"]


def test_cookies_are_not_kept():
    with (
        open_desk(lambda exchange, _: exchange.answer(200, Set_Cookie="a=b")) as desk,
        registry_at(desk.host) as registry,
    ):
        read(registry)
        read(registry)
    assert not any("cookie" in seen.headers for seen in desk.seen)


def test_a_body_in_pieces_goes_with_its_length(desk):
    pieces = [b"ab", b"cde"]
    with registry_at(desk.host) as registry:
        read(
            registry, method="PATCH", content=lambda: iter(pieces), headers={"Content-Length": "5"}
        )
    (seen,) = desk.seen
    assert seen.body == b"abcde"
    assert "transfer-encoding" not in seen.headers


def test_a_body_is_made_anew_for_the_second_time():
    def say(exchange, seen):
        if seen.target.startswith("/token"):
            exchange.answer(200, b'{"token": "t"}')
        elif "authorization" in seen.headers:
            exchange.answer(202)
        else:
            realm = f'Bearer realm="http://{seen.headers["host"]}/token"'
            exchange.answer(401, WWW_Authenticate=realm)

    made = []

    def content():
        made.append(1)
        yield b"all of it"

    with open_desk(say) as desk, registry_at(desk.host) as registry:
        assert read(registry, "blobs/uploads/1", "PATCH", content=content)[0] == 202
    assert [seen.body for seen in desk.seen] == [b"all of it", b"", b"all of it"]
    assert len(made) == 2


def test_an_error_of_the_body_stays_what_it_is(desk):
    def content():
        yield b"half"
        raise StoreError("the disk is gone")

    with registry_at(desk.host) as registry, pytest.raises(StoreError, match="the disk is gone"):
        read(registry, method="PUT", content=content)


def test_who_does_not_ask_for_authorisation_gets_the_401_itself():
    with (
        open_desk(lambda exchange, _: exchange.answer(401, b"who are you")) as desk,
        registry_at(desk.host) as registry,
    ):
        assert read(registry, authorised=False)[0] == 401
    assert len(desk.seen) == 1


# -------------------------------------------------------------------- redirects


def to(location, status=307):
    return lambda exchange, _: exchange.answer(status, Location=location)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_redirects_are_followed_with_the_range(desk, status, method):
    with (
        open_desk(to(f"http://{desk.host}/there?x=%2F", status)) as first,
        registry_at(first.host) as registry,
    ):
        read(registry, method=method, headers={"Range": "bytes=0-3"})
    (seen,) = desk.seen
    assert (seen.method, seen.target, seen.headers["range"]) == (
        method,
        "/there?x=%2F",
        "bytes=0-3",
    )


@pytest.mark.parametrize(
    ("method", "follow"), [("PATCH", True), ("PUT", True), ("POST", True), ("GET", False)]
)
def test_other_redirects_are_told(desk, method, follow):
    with (
        open_desk(to(f"http://{desk.host}/there")) as first,
        registry_at(first.host) as registry,
        registry.send(method, "blobs/x", follow=follow) as response,
    ):
        assert response.status_code == 307
        assert registry.location(response) == f"http://{desk.host}/there"
    assert desk.seen == []


def test_a_relative_redirect_starts_where_we_are():
    def say(exchange, seen):
        if seen.target.endswith("/latest"):
            exchange.answer(302, Location="../blobs/x?y")
        else:
            exchange.answer(200)

    with open_desk(say) as desk, registry_at(desk.host) as registry:
        read(registry)
    assert desk.targets()[1] == "/v2/me/tale/blobs/x?y"


def test_a_redirect_does_not_cost_a_connection():
    """Each part of a blob is redirected; a new connection for each would be slow."""
    callers = set()

    def say(exchange, seen):
        callers.add(exchange.client_address)
        if seen.target.endswith("/latest"):
            exchange.answer(302, b"over there", Location="/there")
        else:
            exchange.answer(200)

    with open_desk(say) as desk, registry_at(desk.host) as registry:
        for _ in range(3):
            read(registry)
    assert (len(desk.seen), len(callers)) == (6, 1)


def test_redirects_in_a_circle_end():
    with (
        open_desk(to("/again")) as desk,
        registry_at(desk.host) as registry,
        pytest.raises(RegistryError, match="redirects more than 10 times"),
    ):
        read(registry)
    assert len(desk.seen) == 11


def test_another_host_is_not_told_who_we_are(desk):
    """A token of the registry, or a header of the caller: neither leaves it; at home both go on."""

    def say(exchange, seen):
        if seen.target.startswith("/token"):
            exchange.answer(200, b'{"token": "secret"}')
        elif "authorization" not in seen.headers:
            realm = f'Bearer realm="http://{seen.headers["host"]}/token"'
            exchange.answer(401, WWW_Authenticate=realm)
        elif seen.target.endswith("/latest"):
            exchange.answer(307, Location="/v2/me/tale/near")
        else:
            exchange.answer(307, Location=f"http://localhost:{desk.port}/far")

    with open_desk(say) as first, registry_at(first.host) as registry:
        assert read(registry)[2] == b"hello"
        near = [seen for seen in first.seen if seen.target.endswith("/near")]
        assert near[-1].headers["authorization"] == "Bearer secret"
        read(registry, headers={"Authorization": "Bearer mine"}, authorised=False)
    assert desk.targets() == ["/far", "/far"]
    assert not any("authorization" in seen.headers for seen in desk.seen)


def test_a_401_of_another_host_is_not_answered():
    """Its realm could name anybody."""
    realm = 'Bearer realm="http://127.0.0.1/token"'
    with (
        open_desk(lambda exchange, _: exchange.answer(401, WWW_Authenticate=realm)) as other,
        open_desk(to(f"http://localhost:{other.port}/x")) as first,
        registry_at(first.host) as registry,
    ):
        assert read(registry)[0] == 401
    assert len(other.seen) == 1


def answered(url="https://registry.example/v2/x", **headers):
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return httpx.Response(307, headers=named, request=httpx.Request("GET", url))


@pytest.fixture
def secure():
    with registry_at("registry.example", insecure=False) as registry:
        yield registry


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://cdn.example/x?sig=%2Fa+b", "https://cdn.example/x?sig=%2Fa+b"),
        ("/up/1", "https://registry.example/up/1"),
        ("up/1?_state=x", "https://registry.example/v2/up/1?_state=x"),
        ("//cdn.example/x", "https://cdn.example/x"),
    ],
)
def test_where_to_go_on_is_made_absolute(secure, given, expected):
    assert secure.location(answered(Location=given)) == expected


def test_dockers_own_header_goes_before_the_general_one(secure):
    both = answered(Location="https://store.example/part", Docker_Upload_Location="/next")
    assert secure.location(both) == "https://registry.example/next"
    assert secure.location(both, redirect=True) == "https://store.example/part"


NO_PLACES = ["file:///etc/passwd", "ftp://h.example/x", "http:///x", "https://[::1"]
NO_HOSTS = ["https://user:pw@h.example/x", "https://a..b/", "https://h\x00.example/"]
NO_PORTS = ["https://h.example:99999/", "https://h.example:-1/", "https://h.example:0/"]


@pytest.mark.parametrize("given", [*NO_PLACES, *NO_HOSTS, *NO_PORTS])
def test_senseless_places_are_refused(secure, given):
    with pytest.raises(RegistryError, match=r"registry\.example:443 names a senseless address"):
        secure.location(answered(Location=given))


@pytest.mark.parametrize("start", ["https://registry.example/x", "https://cdn.example/x"])
def test_nothing_leads_from_https_down_to_http(secure, start):
    with pytest.raises(RegistryError, match="from https down to http"):
        secure.location(answered(start, Location="http://registry.example/x"))


def test_who_does_not_say_where_to_go_on_is_told(secure):
    with pytest.raises(RegistryError, match="does not say where"):
        secure.location(answered())


# -------------------------------------------------------------------- private addresses


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("192.168.0.9", True),
        ("172.16.0.1", True),
        ("169.254.169.254", True),  # where clouds keep their secrets
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("::1", True),
        ("fe80::1", True),
        ("fd00::1", True),
        ("::ffff:127.0.0.1", True),
        ("127.1", True),
        ("0x7f000001", True),
        ("2130706433", True),
        ("localhost", True),
        ("x.localhost.", True),
        ("8.8.8.8", False),
        ("2606:4700::1111", False),
        ("::ffff:8.8.8.8", False),
        ("registry.example", False),
        ("localhost.example", False),
    ],
)
def test_which_names_say_that_they_are_private(host, private):
    assert peers.names_private(host) is private


@pytest.fixture
def public_loopback(monkeypatch):
    """127.0.0.1 counts as a public address; ::1 and 127.0.0.2 stay private."""
    real = peers.is_private
    monkeypatch.setattr(peers, "is_private", lambda text: text != "127.0.0.1" and real(text))


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "[::1]"])
def test_a_public_registry_does_not_lead_into_the_house(public_loopback, desk, host):
    with (
        open_desk(to(f"http://{host}:{desk.port}/secret")) as first,
        registry_at(first.host) as registry,
    ):
        with pytest.raises(RegistryError, match="private address: refused"):
            read(registry)
        with pytest.raises(RegistryError, match="private address: refused"):
            read(registry, f"http://{host}:{desk.port}/upload", "PUT", authorised=False)
    assert desk.seen == []


@pytest.fixture
def neighbour(desk):
    """Listens at a private address, on the port of the desk; it must never hear a word."""
    with socket.create_server(("127.0.0.2", desk.port)) as listener:
        yield listener
        listener.settimeout(5)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(100) == b""


@pytest.mark.usefixtures("public_loopback", "neighbour")
def test_a_public_name_with_a_private_address_is_found_out(desk, monkeypatch):
    """What counts is where the connection ends, not what the name looks like."""
    lead_to(monkeypatch, {"inner.example": "127.0.0.2"})
    with (
        open_desk(to(f"http://inner.example:{desk.port}/secret")) as first,
        registry_at(first.host) as registry,
        pytest.raises(RegistryError, match=r"inner\.example, which is a private address: refused"),
    ):
        read(registry)


@pytest.mark.usefixtures("public_loopback", "neighbour")
def test_a_name_that_turns_private_later_is_found_out(desk, monkeypatch):
    places = {"turning.example": "127.0.0.1"}
    lead_to(monkeypatch, places)
    with (
        registry_at(f"turning.example:{desk.port}") as registry,
        registry.send("GET", "first") as first,
    ):
        assert first.status_code == 200
        places["turning.example"] = "127.0.0.2"
        with pytest.raises(RegistryError, match="private address: refused"):
            read(registry, "second")  # the first connection is busy, so this needs another
    assert desk.targets() == ["/v2/me/tale/first"]


@pytest.mark.usefixtures("public_loopback")
def test_a_name_that_was_private_before_is_not_trusted_once_it_is_public(desk, monkeypatch):
    """Who owns a name could let it begin with an address of ours."""
    secret = to(f"http://localhost:{desk.port}/secret")
    places = {"turning.example": "127.0.0.2"}
    lead_to(monkeypatch, places)
    with open_desk(secret) as first, registry_at(f"turning.example:{first.port}") as registry:
        with socket.create_server(("127.0.0.2", first.port)), pytest.raises(Passing):
            registry.stall = 0.1
            read(registry)
        registry.stall = 10
        places["turning.example"] = "127.0.0.1"
        with pytest.raises(RegistryError, match="private address: refused"):
            read(registry)
    assert desk.seen == []


def lead_to(monkeypatch, places):
    """Names that the test gives an address to."""
    real = socket.create_connection

    def connect(address, *args, **more):
        return real((places.get(address[0], address[0]), address[1]), *args, **more)

    monkeypatch.setattr(socket, "create_connection", connect)


def test_a_private_registry_may_lead_anywhere_private(desk):
    with (
        open_desk(to(f"http://localhost:{desk.port}/x")) as first,
        registry_at(first.host) as registry,
    ):
        assert read(registry)[2] == b"hello"


# -------------------------------------------------------------------- proxies


def test_a_proxy_is_used_for_what_is_far(desk, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://{desk.host}")
    with registry_at("registry.example") as registry:
        assert read(registry)[2] == b"hello"
    assert desk.targets() == ["http://registry.example/v2/me/tale/manifests/latest"]


def test_a_proxy_is_not_used_for_this_machine(desk, monkeypatch):
    with open_desk(hello) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.host}")
        with registry_at(desk.host) as registry:
            read(registry)
    assert (len(desk.seen), proxy.seen) == (1, [])


@pytest.mark.parametrize("proxy", ["gopher://h", "http://h:port"])
def test_a_proxy_that_cannot_be_is_told(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(BadRequest, match="proxy"):
        registry_at("registry.example")


def test_behind_a_proxy_names_decide(monkeypatch):
    with open_desk(to("http://169.254.169.254/latest/meta-data")) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.host}")
        with (
            registry_at("registry.example") as registry,
            pytest.raises(RegistryError, match="private"),
        ):
            read(registry)
    assert len(proxy.seen) == 1


# -------------------------------------------------------------------- what breaks


def test_who_was_never_reached_is_not_waited_for():
    with open_desk(hello) as desk:
        host = desk.host
    with registry_at(host) as registry, pytest.raises(RegistryError) as caught:
        read(registry)
    assert str(caught.value) == f"cannot reach {host}: connection refused"
    assert not isinstance(caught.value, Passing)


def test_who_was_reached_before_may_come_back():
    with open_desk(hello) as desk:
        registry = registry_at(desk.host)
        read(registry)
    with registry, pytest.raises(Passing, match=rf"{registry._base.host}:\d+"):
        read(registry)


def test_a_name_without_address_is_told(monkeypatch):
    def unknown(*_args, **_more):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with registry_at("registry.example") as registry, pytest.raises(RegistryError) as caught:
        read(registry)
    assert str(caught.value) == "cannot reach registry.example:80: this name has no address"


def silent(exchange, _):
    exchange.server.stopped.wait()


def silent_in_the_middle(exchange, _):
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    exchange.wfile.flush()
    exchange.server.stopped.wait()


@pytest.mark.parametrize("say", [silent, silent_in_the_middle])
def test_a_stall_may_pass(say):
    with open_desk(say) as desk, registry_at(desk.host) as registry:
        registry.stall = 0.2
        start = time.perf_counter()
        with pytest.raises(
            Passing, match=f"the connection to {desk.host} broke: nothing was heard"
        ):
            read(registry)
        assert time.perf_counter() - start < 5


def cut(data):
    def say(exchange, _):
        exchange.wfile.write(data)
        exchange.close_connection = True

    return say


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
TOO_SHORT = [
    b"",
    b"HTTP/1.1 20",
    OK + b"Content-Length: 10\r\n\r\nhalf",
    CHUNKED + b"5\r\nhello\r\n",
]
NO_HTTP = [b"\x00" * 50, CHUNKED + b"zz\r\n", OK + b"Content-Length: -5\r\n\r\n"]


@pytest.mark.parametrize("data", [*TOO_SHORT, *NO_HTTP, OK + b"X: " + b"y" * 200_000])
def test_a_broken_answer_may_pass(data):
    with (
        open_desk(cut(data)) as desk,
        registry_at(desk.host) as registry,
        pytest.raises(Passing, match=f"the connection to {desk.host} broke: "),
    ):
        read(registry)


def test_what_breaks_while_the_caller_reads_may_pass():
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
    got = b""
    with (
        open_desk(cut(data)) as desk,
        registry_at(desk.host) as registry,
        pytest.raises(Passing),
        registry.send("GET", "blobs/x") as response,
    ):
        for piece in response.iter_raw():
            got += piece
    assert got == b"half"


def test_closing_wakes_who_waits():
    with open_desk(silent_in_the_middle) as desk:
        registry, caught = registry_at(desk.host), []

        def work():
            try:
                read(registry)
            except RefollamaError as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        wait_until(lambda: desk.seen)
        time.sleep(0.05)  # so that it waits for the body
        start = time.perf_counter()
        registry.close()
        thread.join()
        assert time.perf_counter() - start < 2
        assert len(caught) == 1
        with pytest.raises(Abandoned):
            read(registry)


def test_a_connection_that_stands_only_after_closing_is_closed(desk, monkeypatch):
    """The pool has forgotten it by then: nobody else would close it."""
    real, made = socket.create_connection, []

    def connect(*args, **more):
        made.append(real(*args, **more))
        registry.close()
        return made[0]

    monkeypatch.setattr(socket, "create_connection", connect)
    with registry_at(desk.host) as registry, pytest.raises(Abandoned):
        read(registry)
    assert made[0].fileno() == -1
    assert desk.seen == []


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# -------------------------------------------------------------------- certificates


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of 127.0.0.1, signed by itself; certificate and key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = tmp_path_factory.mktemp("certificates") / "both.pem"
    path.write_bytes(made.public_bytes(Encoding.PEM) + pem)
    return path


@pytest.fixture
def safe_desk(certificate):
    with open_desk(hello) as one:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        one.server.socket = context.wrap_socket(
            one.server.socket, server_side=True, do_handshake_on_connect=False
        )
        yield one


def test_a_certificate_that_nobody_vouches_for(safe_desk):
    with (
        registry_at(safe_desk.host, insecure=False) as registry,
        pytest.raises(RegistryError) as caught,
    ):
        read(registry)
    problem = "its certificate is not valid: self-signed certificate"
    assert str(caught.value) == f"cannot reach {safe_desk.host}: {problem}"
    assert not isinstance(caught.value, Passing)
    assert safe_desk.seen == []


def test_a_certificate_of_another_name(safe_desk, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with (
        registry_at(f"localhost:{safe_desk.port}", insecure=False) as registry,
        pytest.raises(RegistryError, match="certificate is not valid: .*localhost"),
    ):
        read(registry)


def test_a_certificate_that_is_trusted(safe_desk, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with registry_at(safe_desk.host, insecure=False) as registry:
        assert read(registry)[2] == b"hello"
        safe_desk.say = to(f"http://{safe_desk.host}/down")
        with pytest.raises(RegistryError, match="from https down to http"):
            read(registry)


def test_certificates_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere.pem"))
    with pytest.raises(BadRequest, match="SSL_CERT_FILE"):
        registry_at("registry.example")


def test_closing_wakes_who_waits_for_a_safe_connection(safe_desk, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    safe_desk.say = silent
    registry = registry_at(safe_desk.host, insecure=False)
    timer = threading.Timer(0.3, registry.close)
    timer.start()
    start = time.perf_counter()
    with pytest.raises(RefollamaError):
        read(registry)
    timer.join()
    assert time.perf_counter() - start < 5


def test_who_speaks_no_tls(desk):
    with (
        registry_at(desk.host, insecure=False) as registry,
        pytest.raises(RegistryError, match=f"^cannot reach {desk.host}: it does not speak https"),
    ):
        read(registry)
    assert desk.seen == []


# -------------------------------------------------------------------- answers


def test_an_answer_is_read_up_to_its_limit():
    sizes = itertools.chain([1000, 1001])
    with (
        open_desk(lambda exchange, _: exchange.answer(200, b"x" * next(sizes))) as desk,
        registry_at(desk.host) as registry,
    ):
        assert len(read(registry)[2]) == 1000
        with pytest.raises(RegistryError, match=f"{desk.host} answers with more than 1000 bytes"):
            read(registry)


def endless(exchange, _):
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:  # until the client hangs up
        exchange.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")


def test_an_endless_answer_is_left():
    with (
        open_desk(endless) as desk,
        registry_at(desk.host) as registry,
        pytest.raises(RegistryError, match="more than 1000 bytes"),
    ):
        read(registry)


def dripping(exchange, _):
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while not exchange.server.stopped.wait(0.02):
        exchange.wfile.write(b"x")


def test_a_slow_drip_is_left(monkeypatch):
    monkeypatch.setattr(session, "SMALL_ANSWER", 0.2)
    with (
        open_desk(dripping) as desk,
        registry_at(desk.host) as registry,
        pytest.raises(Passing, match=f"{desk.host} answers too slowly"),
    ):
        read(registry)


def test_a_compressed_answer_is_refused():
    """A gzip bomb is never unpacked: we did not ask for it."""
    bomb = gzip.compress(b"\x00" * 100_000)
    with (
        open_desk(lambda exchange, _: exchange.answer(200, bomb, Content_Encoding="gzip")) as desk,
        registry_at(desk.host) as registry,
        pytest.raises(RegistryError, match="compressed"),
    ):
        read(registry)


def refused(status, body=b"", **headers):
    with (
        open_desk(lambda exchange, _: exchange.answer(status, body, **headers)) as desk,
        registry_at(desk.host) as registry,
        pytest.raises(RegistryError) as caught,
        registry.send("GET", "x", authorised=False) as response,
    ):
        registry.refuse(response)
    return caught.value


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_refusals_that_may_pass(status):
    assert isinstance(refused(status), Passing)


@pytest.mark.parametrize("status", [400, 404, 405, 409, 412, 416, 451, 204, 302])
def test_refusals_that_stay(status):
    assert type(refused(status)) is RegistryError


@pytest.mark.parametrize("status", [401, 403])
def test_refusals_of_us(status):
    assert isinstance(refused(status), Unauthorized)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "404"),
        (b'{"errors": [ ]}\n', '404: {"errors": [ ]}'),
        (b"a\x1b[31m\x00b\r\nc\xff", "404: a�[31m�b c�"),
        (b"x" * 5000, "404: " + "x" * 1024),
    ],
)
def test_a_refusal_is_quoted_in_bounds(body, text):
    assert str(refused(404, body)) == text


def test_a_refusal_that_breaks_off_is_still_one():
    data = b"HTTP/1.1 503 no\r\nContent-Length: 10\r\n\r\nhalf"
    with (
        open_desk(cut(data)) as desk,
        registry_at(desk.host) as registry,
        pytest.raises(Passing, match="^503"),
        registry.send("GET", "x") as response,
    ):
        registry.refuse(response)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("9" * 400, 999999999.0),
        ("-1", None),
        ("soon", None),
        ("", None),
        ("²", None),
    ],
)
def test_when_to_come_back(header, seconds):
    error = failures.refusal(429, httpx.Headers({"Retry-After": header.encode()}), b"")
    assert isinstance(error, Passing)
    assert error.retry_after == seconds


def test_when_to_come_back_may_be_a_date():
    then = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=100)
    text = then.strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert 90 < wait_of(refused(503, Retry_After=text)) < 101
    assert wait_of(refused(503, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT")) == 0


def wait_of(error):
    assert isinstance(error, Passing)
    assert error.retry_after is not None
    return error.retry_after


# -------------------------------------------------------------------- again


class Fails:
    """Fails so many times, then works."""

    def __init__(self, times, **more):
        self.left, self.calls, self.more = times, 0, more

    def __call__(self):
        self.calls += 1
        if self.left:
            self.left -= 1
            raise Passing(f"failure {self.calls}", **self.more)
        return "done"


def attempt(work, **more):
    waited = []

    class Clock(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            return False

    try:
        return retried(work, cancelled=Clock(), **more), waited
    except RegistryError as error:
        return str(error), waited


def test_it_is_tried_again_ever_later():
    assert attempt(Fails(5)) == ("done", [1, 2, 4, 8, 16])


def test_it_is_given_up_after_the_last_time_without_waiting_once_more():
    work = Fails(99)
    assert attempt(work) == ("max retries exceeded: failure 6", [1, 2, 4, 8, 16])
    assert work.calls == 6
    assert attempt(Fails(99), tries=2, wait=lambda _: 0.5) == (
        "max retries exceeded: failure 2",
        [0.5],
    )


def test_what_a_registry_asks_for_is_waited_in_bounds():
    assert attempt(Fails(1, retry_after=7)) == ("done", [7])
    assert attempt(Fails(1, retry_after=1e6)) == ("done", [60])


def test_what_stays_is_not_tried_again():
    calls = []

    def work():
        calls.append(1)
        raise Unauthorized("no")

    with pytest.raises(Unauthorized):
        retried(work, cancelled=threading.Event())
    assert len(calls) == 1


def test_giving_up_tells_no_caller_to_try_again():
    with pytest.raises(RegistryError) as caught:
        retried(Fails(9), cancelled=threading.Event(), tries=1)
    assert not isinstance(caught.value, Passing)


def test_who_is_cancelled_wakes_at_once():
    cancelled = threading.Event()
    threading.Timer(0.1, cancelled.set).start()
    start = time.perf_counter()
    with pytest.raises(Abandoned):
        retried(Fails(99), cancelled=cancelled, wait=lambda _: 60)
    assert time.perf_counter() - start < 5


def test_who_is_cancelled_does_not_begin():
    cancelled, work = threading.Event(), Fails(0)
    cancelled.set()
    with pytest.raises(Abandoned):
        retried(work, cancelled=cancelled)
    assert work.calls == 0
