"""What one call may take of the time that all share: bounds that are looked at before the work."""

from __future__ import annotations

import threading
import time

import pytest
from server.server_helpers import Running, running, until

MANY = 700_000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"stop_token_ids": [""] * MANY}, f"stop_token_ids holds {MANY} items; it may hold at most 8192"),
        ({"logit_bias": {str(i): "" for i in range(200_000)}}, "logit_bias holds 200000 items"),
        ({"stop": [""] * MANY}, f"stop holds {MANY} items"),
        ({"prompt": [*range(9), *[""] * MANY]}, "prompt must be a string"),
        ({"prompt": [[5], *[[""]] * MANY]}, "prompt must be a string"),
    ],
)
def test_a_long_list_that_is_wrong_holds_up_nobody(server: Running, body: dict, words: str) -> None:
    """Each of its items would be an error of its own, and all of them are made where everybody's tokens go through."""
    reply = server.post(**{"prompt": "x", "max_tokens": 1, **body})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]


def test_messages_and_tokens_are_bounded_likewise(server: Running) -> None:
    reply = server.http.post("/v1/chat/completions", json={"messages": [0] * MANY})
    assert reply.status_code == 400 and f"messages holds {MANY} items" in reply.json()["error"]["message"]
    reply = server.http.post("/detokenize", json={"tokens": [{}] * MANY})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tokens.0"


def test_a_text_that_is_too_long_is_not_tokenised(server: Running) -> None:
    config, longest = server.decoder.decoder.config, server.state.served.token_text.longest
    text = "ab" * (config.max_position * longest)
    for reply in (server.post(prompt=text, max_tokens=1), server.http.post("/tokenize", json={"prompt": text})):
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["code"] == "context_length_exceeded" and f"has {len(text)} characters" in error["message"]


def test_calls_that_wait_for_their_prompts_are_bounded_and_timed() -> None:
    with running(max_waiting=2) as server:
        gate = threading.Event()
        server.state.prompts.submit(gate.wait)
        replies: list[int] = []
        threads = [
            threading.Thread(target=lambda: replies.append(server.post(prompt="x", max_tokens=1, timeout=30).status_code)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        while server.state.num_preparing < 2:
            time.sleep(0.01)
        refused = server.post(prompt="x", max_tokens=1)
        assert refused.status_code == 429 and "2 calls wait for their prompts" in refused.json()["error"]["message"]
        gate.set()
        for thread in threads:
            thread.join()
        assert replies == [200, 200] and server.state.num_preparing == 0
        server.state.prompts.submit(time.sleep, 0.3)
        late = server.post(prompt="x", max_tokens=500, timeout=0.2, ignore_eos=True).json()["choices"][0]
        assert late["finish_reason"] == "abort" and len(late["text"]) < 100


def test_a_priority_is_worth_minutes_and_no_more(server: Running) -> None:
    for priority in (11, -1_000_000):
        reply = server.post(prompt="x", max_tokens=1, priority=priority)
        assert reply.status_code == 400 and "this server takes at most 10" in reply.json()["error"]["message"]
    assert server.post(prompt="x", max_tokens=1, priority=-10).status_code == 200


def test_no_message_but_of_length_has_the_code_of_length(server: Running) -> None:
    error = server.post(prompt="x", max_tokens=1, regex="(cache").json()["error"]
    assert error["code"] is None


def test_connections_are_bounded() -> None:
    with running(max_connections=3) as server:
        held = [server.connect() for _ in range(8)]
        cut = set()

        def look() -> bool:
            for i, one in enumerate(held):
                one.settimeout(0.01)
                try:
                    if one.recv(1) == b"":
                        cut.add(i)
                except TimeoutError:
                    pass
                except OSError:
                    cut.add(i)
            return len(cut) >= 5

        until(look)
        assert cut == {3, 4, 5, 6, 7}
        for one in held:
            one.close()
        until(lambda: server.http.get("/health", headers={"connection": "close"}).status_code == 200)
