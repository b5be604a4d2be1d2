"""OLLAMA_HOST means the same to the server and to its clients."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import BadRequest
from refollama.host import base_url, listen_address, on_this_machine

HERE = "127.0.0.1"

# value, where a server listens, where a client looks
FORMS = [
    ("", (HERE, 11434), f"http://{HERE}:11434"),
    ("   ", (HERE, 11434), f"http://{HERE}:11434"),
    ("1.2.3.4", ("1.2.3.4", 11434), "http://1.2.3.4:11434"),
    ("example.com", ("example.com", 11434), "http://example.com:11434"),
    ("example.com/", ("example.com", 11434), "http://example.com:11434"),
    ("my_box-1", ("my_box-1", 11434), "http://my_box-1:11434"),
    ("example.com:1234", ("example.com", 1234), "http://example.com:1234"),
    (":1234", ("0.0.0.0", 1234), f"http://{HERE}:1234"),
    (":", ("0.0.0.0", 11434), f"http://{HERE}:11434"),
    ("1234", (HERE, 1234), f"http://{HERE}:1234"),
    ("0.0.0.0", ("0.0.0.0", 11434), f"http://{HERE}:11434"),
    ("0.0.0.0:99", ("0.0.0.0", 99), f"http://{HERE}:99"),
    ("::", ("::", 11434), "http://[::1]:11434"),
    ("::1", ("::1", 11434), "http://[::1]:11434"),
    ("[::1]", ("::1", 11434), "http://[::1]:11434"),
    ("[::1]:99", ("::1", 99), "http://[::1]:99"),
    ("[::]:99", ("::", 99), "http://[::1]:99"),
    ("fe80::1%eth0", ("fe80::1%eth0", 11434), "http://[fe80::1%25eth0]:11434"),
    ("http://1.2.3.4", ("1.2.3.4", 80), "http://1.2.3.4:80"),
    ("https://1.2.3.4", ("1.2.3.4", 443), "https://1.2.3.4:443"),
    ("HTTPS://h:1234", ("h", 1234), "https://h:1234"),
    ("http://h:1234///", ("h", 1234), "http://h:1234"),
    ("http://[::1]:9", ("::1", 9), "http://[::1]:9"),
    ("https://h/models/", ("h", 443), "https://h:443/models"),
    (' "1.2.3.4:5" ', ("1.2.3.4", 5), "http://1.2.3.4:5"),
    ("'example.com'", ("example.com", 11434), "http://example.com:11434"),
]


@pytest.mark.parametrize(("value", "listens", "looks"), FORMS)
def test_every_form(value, listens, looks):
    assert listen_address({"OLLAMA_HOST": value}) == listens
    assert base_url({"OLLAMA_HOST": value}) == looks


def test_unset_is_empty():
    assert listen_address({}) == listen_address({"OLLAMA_HOST": ""})
    assert base_url({}) == base_url({"OLLAMA_HOST": ""})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("host:99999", "between 0 and 65535, not '99999'"),
        ("host:-1", "between 0 and 65535"),
        ("host:http", "not 'http'"),
        ("ftp://host", "scheme must be http or https, not 'ftp'"),
        ("[1::2::3]:4", "no IPv6 address"),
        ("[::1]99", "no IPv6 address"),
        ("user@host", "no host name"),
        ("two words", "no host name"),
        ("999999", "between 0 and 65535"),
    ],
)
def test_what_is_wrong_is_named(value, problem):
    for read in (listen_address, base_url):
        with pytest.raises(BadRequest, match=f"^OLLAMA_HOST .*{problem}.*host:port"):
            read({"OLLAMA_HOST": value})


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("127.0.0.1:0", HERE),
        ("0", HERE),
        (":0", "0.0.0.0"),
        ("[::1]:0", "::1"),
        ("http://h:0", "h"),
        ("h:00", "h"),
    ],
)
def test_a_server_may_take_any_port_and_a_client_may_not(value, host):
    assert listen_address({"OLLAMA_HOST": value}) == (host, 0)
    with pytest.raises(BadRequest, match="^OLLAMA_HOST .*: port 0 is for servers only"):
        base_url({"OLLAMA_HOST": value})


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_bad_request(value):
    try:
        host, port = listen_address({"OLLAMA_HOST": value})
    except BadRequest:
        return
    assert host
    assert 0 <= port <= 65535


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.9.9.9:1", True),
        ("http://[::1]:1", True),
        ("http://LOCALHOST:1/x", True),
        ("http://localhost.:1", True),
        ("http://10.0.0.1:1", False),
        ("http://localhost.example.com:1", False),
    ],
)
def test_this_machine(url, near):
    assert on_this_machine(url) is near
