"""What the server says of itself: for Prometheus, for its page, and in its log."""

from __future__ import annotations

import json
import logging

from prometheus_client.parser import text_string_to_metric_families
from server.server_helpers import Running, running

from engine import PromptLookup
from engine.server.gate import LogLines


def numbers(server: Running) -> dict[str, float]:
    """Samples by name and labels."""
    text = server.http.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {s.name + "".join(f",{k}={v}" for k, v in sorted(s.labels.items())): s.value for s in samples}


def test_requests_and_tokens_are_counted() -> None:
    with running(decoder_options={"draft": PromptLookup()}) as server:
        prompt = list(range(100, 148))
        for stream in (False, True, False):
            assert server.post(prompt=prompt, max_tokens=12, ignore_eos=True, stream=stream, seed=1).status_code == 200
        server.post(prompt=prompt, max_tokens=0)
        server.http.get("/nowhere")
        got = numbers(server)
        assert got["engine_http_requests_total,route=/v1/completions,status=200"] == 3
        assert got["engine_http_requests_total,route=/v1/completions,status=400"] == 1
        assert got["engine_http_requests_total,route=none,status=404"] == 1
        assert got["engine_http_request_duration_seconds_count,route=/v1/completions"] == 4
        assert got["engine_generation_tokens_total"] == 36 and got["engine_prompt_tokens_total"] == 144
        assert got["engine_finished_requests_total,finish_reason=length"] == 3
        assert got["engine_time_to_first_token_seconds_count"] == got["engine_time_per_output_token_seconds_count"] == 3
        assert got["engine_inter_token_latency_seconds_count"] >= 1
        assert got["engine_running_requests"] == got["engine_waiting_requests"] == got["engine_cache_use_ratio"] == 0
        assert got["engine_cache_blocks_free"] == got["engine_cache_blocks"] == 512
        # The second and third prompt find two whole blocks of the first, and must compute the last token's.
        assert got["engine_cached_prompt_tokens_total"] == 64 and got["engine_prefix_cache_hit_ratio"] == 64 / 144
        assert got["engine_drafted_tokens_total"] >= got["engine_accepted_tokens_total"] >= 0
        assert got["engine_steps_total"] > 0 and got["engine_step_part_seconds_total,part=forward"] > 0

        stats = server.http.get("/stats").json()
        assert (stats["model"], stats["state"]) == ("bundled", "ready")
        assert stats["decoder"]["num_new_tokens"] == 36 and stats["decoder"]["hit_rate"] == 64 / 144

        usage = server.post(prompt=prompt, max_tokens=1).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 32} and usage["prompt_tokens"] == 48
        usage = server.post(prompt=prompt, max_tokens=1, cache_salt="another").json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_line_for_each_request(server: Running, caplog) -> None:
    with caplog.at_level(logging.INFO, "engine.server"):
        server.http.post("/v1/completions", json={"prompt": "x = ", "max_tokens": 3, "ignore_eos": True}, headers={"x-request-id": "mine"})
        server.http.post("/v1/completions", json={"prompt": "a secret", "max_tokens": 0})
        server.http.get("/stats")
    good, bad = (json.loads(LogLines("json").format(entry)) for entry in caplog.records if entry.name == "engine.server")
    assert (good["request_id"], good["status"], good["path"], good["method"]) == ("mine", 200, "/v1/completions", "POST")
    assert (good["completion_tokens"], good["finish_reasons"], good["stream"]) == (3, "length", False)
    assert good["seconds"] > good["first_token_seconds"] > 0 and good["id"].startswith("cmpl-")
    assert bad["status"] == 400 and "max_tokens is 0" in bad["error"]
    assert "secret" not in caplog.text
    text = LogLines("text").format(caplog.records[-1])
    assert "\n" not in text and 'error="max_tokens is 0' in text
