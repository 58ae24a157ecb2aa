"""API keys: which requests are accepted, how many at once, and what keys share in the prefix cache."""

import base64
import concurrent.futures

import pytest
from serving import httpx, started

from nanohybrid.cli.serve import read_keys
from nanohybrid.errors import InputError
from nanohybrid.serve.service import Settings

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def locked():
    with started(Settings(api_keys=("correct-horse", "battery-staple")), max_model_len=256) as running:
        yield running


def test_every_route_but_health_and_ready_needs_a_key(locked):
    routes = [
        (method, route.path) for route in locked.server.config.app.routes for method in route.methods or ()
    ]
    routes += [
        ("GET", "/nothing"),
        ("POST", "//v1/models"),
        ("GET", "/health/"),
        ("GET", "/Health"),
        ("GET", "/health/../v1/models"),
    ]
    statuses = {(method, path): locked.http.request(method, path).status_code for method, path in routes}
    assert (
        len(routes) > 12 and {("GET", "/"), ("GET", "/openapi.json"), ("GET", "/metrics")} <= statuses.keys()
    )
    for (_, path), status in statuses.items():
        assert (status == 401) == (path not in ("/health", "/ready")), (path, status)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer correct-horse", 200),
        ("bearer battery-staple", 200),
        ("Bearer correct-horsf", 401),
        ("Bearer", 401),
        ("correct-horse", 401),
        ("Bearer correct-horse x", 401),
        ("Basic " + base64.b64encode(b"me:correct-horse").decode(), 200),
        ("Basic " + base64.b64encode(b"correct-horse:").decode(), 401),
        ("Basic !", 401),
        ("", 401),
    ],
)
def test_only_a_valid_key_is_accepted(locked, header, status):
    assert locked.http.get("/v1/models", headers={"authorization": header}).status_code == status


def test_browser_gets_a_basic_auth_challenge(locked):
    assert locked.http.get("/").headers["www-authenticate"].startswith("Basic")


def test_api_keys_are_read_from_file_and_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n two \n")
    monkeypatch.setenv("NANOHYBRID_API_KEY", "three")
    assert read_keys(path) == ("three", "one", "two") and read_keys(None) == ("three",)
    path.write_text("\n")
    monkeypatch.delenv("NANOHYBRID_API_KEY")
    with pytest.raises(InputError, match="has no key"):
        read_keys(path)
    with pytest.raises(InputError, match="No such file"):
        read_keys(tmp_path / "nowhere")


def test_max_requests_per_key_limits_each_key_separately():
    settings = Settings(max_queue=8, api_keys=("one", "two"), max_requests_per_key=2)
    with started(settings) as serve:

        def ask(key, **more):
            headers = {"authorization": f"Bearer {key}"}
            body = {"messages": MESSAGES, "max_tokens": 3, **more}
            return httpx.post(f"{serve.url}/v1/chat/completions", json=body, headers=headers, timeout=30)

        serve.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            first = [pool.submit(ask, "one"), pool.submit(ask, "one")]
            serve.until(lambda: serve.service.loop.num_admitted == 2)
            refused = ask("one")
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            other = pool.submit(ask, "two", n=2)
            serve.until(lambda: serve.service.loop.num_admitted == 4)
            serve.gate.set()
            assert [one.result().status_code for one in (*first, other)] == [200] * 3
        assert ask("one").status_code == 200 and not serve.service.loop.admitted_by_key


def test_api_keys_do_not_share_cached_prefixes():
    for keys, shared in ((("one", "two"), False), (("one",), True)):
        with started(Settings(api_keys=keys), prefix_cache_bytes=1 << 26) as serve:

            def ask(key, serve=serve):
                body = {
                    "messages": [{"role": "system", "content": "be brief " * 30}, *MESSAGES],
                    "max_tokens": 2,
                }
                answer = serve.http.post(
                    "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}
                ).json()
                return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["nanohybrid"][
                    "cache_miss"
                ]

            assert ask("one") == (0, "no checkpoint")
            assert (ask(keys[-1])[0] > 0) == shared
            assert ask("one")[0] > 0
