"""Whose requests a server on this machine answers; the annotation page's and the chat server's tests ask them."""

import pytest

from moe_vlm_jax import origins


@pytest.mark.parametrize(
    ("host", "loopback", "anywhere"),
    [
        ("127.0.0.1:80", True, True),
        ("LOCALHOST", True, True),
        ("[::1]:80", True, True),
        ("192.0.2.7", False, True),  # an address cannot be made to point elsewhere
        ("gpu7.example", False, True),  # a name that was allowed
        ("evil.example", False, False),
        ("gpu7.example.evil", False, False),
        ("", False, False),
        ("[", False, False),
    ],
)
def test_a_request_must_name_this_host(host, loopback, anywhere):
    assert origins.Guard("127.0.0.1", "127.0.0.1").is_this_host(host) is loopback
    assert origins.Guard("0.0.0.0", "0.0.0.0", ["GPU7.example"]).is_this_host(host) is anywhere


def test_only_a_loopback_address_is_out_of_reach_of_others():
    assert [origins.Guard("", a).is_loopback() for a in ("127.0.0.1", "::1", "0.0.0.0", "::")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({}, "/x", None),
        ({"Origin": "http://127.0.0.1:80"}, "/x", None),
        ({"Origin": "http://127.0.0.1:81"}, "/x", 403),
        ({"Sec-Fetch-Site": "same-origin"}, "/x", None),
        ({"Sec-Fetch-Site": "cross-site"}, "/x", 403),
        ({"Sec-Fetch-Site": "cross-site"}, "/", None),
        ({"Host": "evil.example"}, "/", 421),
    ],
)
def test_a_page_of_another_site_is_refused(headers, path, status):
    given = {"Host": "127.0.0.1:80", **headers}
    refusal = origins.Guard("127.0.0.1", "127.0.0.1").refusal(given.get, path, "http://here/")
    assert (refusal and int(refusal[0])) == status


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:80/"), ("::1", "http://[::1]:80/")])
def test_the_url_of_an_address(host, url):
    assert origins.url_of(host, 80) == url
