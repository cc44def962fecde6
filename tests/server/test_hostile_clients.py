"""Clients that send what is no request, too much, too slowly, or nothing; that leave, or do not read."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from server.server_helpers import SECONDS, Running, is_error, running, until

BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """A server that loses its patience soon."""
    with running(api_keys=("first", "second"), max_body_bytes=20_000, body_timeout=0.5, head_timeout=0.5, write_timeout=0.5) as one:
        one.http.headers["authorization"] = "Bearer second"
        yield one


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


def test_only_who_bears_a_key_is_let_in(strict: Running) -> None:
    for key in ("Bearer first", "Bearer second", "bearer first"):
        assert strict.http.get("/v1/models", headers={"authorization": key}).status_code == 200
    for key in ("Bearer third", "Bearer", "Basic first", "first", "Bearer firs", "Bearer firstt", "Bearer \xe9", ""):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/stats"), ("GET", "/no")):
            reply = strict.http.request(method, path, headers={"authorization": key.encode("latin-1")})
            is_error(reply, 401, "API key")
            assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/ready"):
        assert strict.http.get(path, headers={"authorization": ""}).status_code == 200


def test_who_bears_no_key_uploads_nothing(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(HEAD + b"content-length: 20000\r\n\r\n")  # and no body
        reply = answer(connection)
    assert status(reply) == 401 and b"connection: close" in reply


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b"\x00", b"[" * 15_000, b'{"prompt":' * 1500, b"{}{}"]
)
def test_what_is_no_object_of_json(strict: Running, content: bytes) -> None:
    is_error(strict.http.post("/v1/completions", content=content, headers={"content-type": "application/json"}), 400)


def test_numbers_beyond_all_bounds(strict: Running) -> None:
    for number in (b"9" * 5000, b"1e999", b"-Infinity", b"NaN", b"0." + b"1" * 5000):
        for field in (b"max_tokens", b"temperature", b"seed", b"n", b"timeout"):
            content = b'{"prompt": "x", "max_tokens": 1, "%s": %s}' % (field, number)
            reply = strict.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert reply.status_code in (200, 400), reply.text
            if reply.status_code == 400:
                is_error(reply, 400)


def test_text_that_is_none_comes_back_in_one_piece(strict: Running) -> None:
    chat = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    for path, content, expected in (
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400),
        ("/v1/completions", b'{"prompt": ["a", "\\ud800"], "echo": true}', 400),
        ("/v1/completions", b'{"\\ud800": 1, "prompt": "x"}', 400),
        ("/v1/completions", b'{"prompt": "x", "logit_bias": {"\\ud800": 1}}', 400),
        ("/v1/completions", b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"\\ud800": 1}}}', 400),
        ("/v1/completions", b'{"prompt": "x", "stop": "\\ud800"}', 400),
        ("/v1/completions", b'{"prompt": "x", "cache_salt": "\\ud800"}', 400),
        ("/v1/completions", b'{"prompt": "x", "model": "\\udfff"}', 404),
        ("/v1/chat/completions", chat, 400),
        ("/tokenize", chat, 400),
        ("/tokenize", b'{"prompt": "\\ud800"}', 400),
    ):
        is_error(strict.http.post(path, content=content, headers={"content-type": "application/json"}), expected)


def test_no_other_content_type(strict: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        is_error(strict.http.post("/v1/completions", content=BODY, headers={"content-type": kind}), 400, "application/json")


def test_paths_and_methods_that_there_are_not(strict: Running) -> None:
    for path in ("/v1", "/v2/models", "/docs", "/page.html", "/%2e%2e/x", "/v1/completions/"):
        is_error(strict.http.get(path), 404)
    for method, path in (("GET", "/v1/completions"), ("PUT", "/v1/models"), ("DELETE", "/"), ("PATCH", "/stats")):
        reply = strict.http.request(method, path)
        is_error(reply, 405)
        assert reply.headers["allow"]


def test_a_body_that_says_it_is_too_long(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(HEAD + b"authorization: Bearer first\r\ncontent-length: 99999999999\r\n\r\n")
        reply = answer(connection)
    assert status(reply) == 413 and b"20000 bytes" in reply


def test_a_body_that_turns_out_too_long(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(HEAD + b"authorization: Bearer first\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(6):
            connection.sendall(b"fa0\r\n" + b" " * 4000 + b"\r\n")
        reply = answer(connection)
    assert status(reply) == 413 and b"20000 bytes" in reply
    padded = BODY + b" " * (20_000 - len(BODY))
    assert strict.http.post("/v1/completions", content=padded, headers={"content-type": "application/json"}).status_code == 200


def test_a_body_that_does_not_come(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(HEAD + b"authorization: Bearer first\r\ncontent-length: 50\r\n\r\n" + BODY[:10])
        assert status(answer(connection)) == 408


@pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", b"GET / HTTP/1.1\r\nhost: x\r\n", HEAD])
def test_a_head_that_does_not_come(strict: Running, sent: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(sent)
        assert answer(connection) == b""


def test_a_head_that_does_not_come_after_a_first_request(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he")
        reply = answer(connection)
    assert reply.count(b"HTTP/1.1 ") == 1 and status(reply) == 200


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"x" * 70_000, b"GET / HTTP/1.1\r\nno colon\r\n\r\n"])
def test_what_is_no_http(strict: Running, sent: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(sent)
        reply = answer(connection)
    assert status(reply) == 400 and json.loads(reply.split(b"\r\n\r\n")[1])["error"]["message"] == "the request is not HTTP"


def test_a_body_that_is_no_chunk(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(HEAD + b"authorization: Bearer first\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")
        answer(connection)  # whatever it is, the connection ends
    assert strict.http.get("/ready").status_code == 200


def test_several_requests_in_one_piece(strict: Running) -> None:
    one = HEAD + b"authorization: Bearer first\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
    with strict.connect() as connection:
        connection.sendall(one * 3 + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        reply = answer(connection)
    assert reply.count(b"HTTP/1.1 200") == 4


def test_request_ids_go_round(strict: Running) -> None:
    assert strict.http.get("/ready", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {strict.http.get("/ready", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 129, "\x7f")}
    assert len(made) == 4 and all(len(one) == 32 for one in made)
    assert strict.http.get("/no", headers={"x-request-id": "abc-2"}).headers["x-request-id"] == "abc-2"


def test_no_other_sites_page_may_call(strict: Running) -> None:
    reply = strict.http.get("/v1/models", headers={"origin": "https://example.com"})
    assert "access-control-allow-origin" not in reply.headers
    with running(cors_origins=("https://example.com",), api_keys=("k",)) as open_to_one:
        asked = {
            "origin": "https://example.com",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        reply = open_to_one.http.options("/v1/completions", headers=asked)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://example.com"
        assert open_to_one.http.options("/v1/completions", headers={**asked, "origin": "https://other.com"}).status_code == 400
        reply = open_to_one.http.get("/v1/models", headers={"origin": "https://example.com"})
        is_error(reply, 401)  # and the page may read it
        assert reply.headers["access-control-allow-origin"] == "https://example.com"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_everything_within_a_step(server: Running, stream: bool) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "n": 4, "stream": stream}).encode()
    with server.slow_steps() as seen:
        connection = server.connect()
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        until(lambda: len(seen) > 3)
        connection.close()
        until(lambda: server.idle)
    assert len(seen) < 1000, "it went on to the end"
    server.until_idle()


def test_who_leaves_while_waiting_is_forgotten(server: Running) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 100}).encode()
    with server.slow_steps(0.02) as seen:
        connections = [server.connect() for _ in range(8)]
        for connection in connections:
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        for connection in connections:
            connection.close()
        until(lambda: server.idle)
    assert len(seen) < 100


def test_who_does_not_read_stops_nobody_and_is_cut_off(strict: Running) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "n": 16, "stream": True, "logprobs": 5}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(SECONDS)
    with connection:
        connection.connect(("127.0.0.1", strict.port))
        connection.sendall(HEAD + b"authorization: Bearer first\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert strict.post(prompt="x", max_tokens=5).status_code == 200
        until(lambda: strict.idle)
        with pytest.raises(ConnectionResetError):
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                connection.send(b"x")
                time.sleep(0.01)
    assert strict.post(prompt="x", max_tokens=5).status_code == 200


def test_who_reads_slowly_gets_all(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 5, "seed": 1}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        text = b""
        for piece in reply.iter_bytes(chunk_size=20_000):
            text += piece
            time.sleep(0.005)
    assert text.endswith(b"data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in text.decode().splitlines() if line and not line.endswith("[DONE]")]
    body["stream"] = False
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == server.post(**body).json()["choices"][0]["text"]


def test_more_than_may_wait_are_sent_away() -> None:
    with running(max_waiting=2, decoder_options={"max_batch_size": 1}) as server, server.slow_steps(0.01):
        body = json.dumps({"prompt": "x", "max_tokens": 50, "ignore_eos": True}).encode()
        request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        connections = []
        for i in range(3):
            connections.append(server.connect())
            connections[-1].sendall(request)
            until(
                lambda i=i: len(server.decoder.decoder.loop.scheduler.running) + len(server.decoder.decoder.loop.scheduler.waiting) == i + 1
            )
        for stream in (False, True):
            reply = server.post(prompt="x", stream=stream)
            is_error(reply, 429, "2 requests are waiting")
            assert int(reply.headers["retry-after"]) >= 1
        for connection in connections:
            assert status(connection.recv(65536)) == 200
            connection.close()


def test_a_step_that_fails_is_a_500_and_the_server_goes_on(server: Running) -> None:
    runner = server.decoder.decoder.loop.runner
    run = runner.run

    def broken(plan):
        runner.run = run
        raise RuntimeError("a kernel's own")

    for stream in (False, True):
        runner.run = broken
        is_error(server.post(prompt="x", stream=stream), 500, "a kernel's own")
    assert server.post(prompt="x", max_tokens=2).status_code == 200


def test_a_stream_that_fails_ends_with_an_error(server: Running) -> None:
    runner = server.decoder.decoder.loop.runner
    run, steps = runner.run, []

    def broken(plan):
        steps.append(plan)
        if len(steps) == 4:
            raise RuntimeError("a kernel's own")
        return run(plan)

    runner.run = broken
    try:
        reply = server.post(prompt="x", stream=True, max_tokens=20, ignore_eos=True)
    finally:
        runner.run = run
    lines = [line for line in reply.text.splitlines() if line]
    assert reply.status_code == 200 and lines[-1] == "data: [DONE]" and len(lines) > 2
    assert "a kernel's own" in json.loads(lines[-2][6:])["error"]["message"]


def test_a_fault_of_the_servers_own_is_a_500_without_its_reason(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call):
        raise KeyError("a secret")

    monkeypatch.setattr(server.state, "prompts_of", broken)
    reply = server.post(prompt="x")
    is_error(reply, 500, "its log has the reason")
    assert "secret" not in reply.text


def test_a_loop_that_has_stopped_is_not_healthy() -> None:
    with running() as server:
        server.decoder.decoder.loop.runner.run = None
        server.decoder.decoder.step = lambda: (_ for _ in ()).throw(KeyboardInterrupt("planted"))  # type: ignore[method-assign]
        is_error(server.post(prompt="x"), 503, "the decoding loop has stopped")
        is_error(server.http.get("/health"), 503, "the decoding loop has stopped")
        is_error(server.http.get("/ready"), 503)
        is_error(server.post(prompt="x"), 503)
        server.decoder.decoder.loop.abort(list(server.decoder.decoder.loop.scheduler.waiting))
