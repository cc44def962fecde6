"""The origin's own call, unchanged, on our decoder."""

from __future__ import annotations

import random

import pytest
import torch
from models.origin_model import OriginConfig, Transformer

from engine import Decoder


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(OriginConfig(dim=96, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=128))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model.eval()


@pytest.fixture(scope="module")
def decoder(model: Transformer) -> Decoder:
    return Decoder(model, cache_tokens=1024)


def origin_greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """The origin samples where it says greedy; its temperature below 0.1 is the greedy it documents."""
    return model.generate_super(torch.tensor([prompt]), max_new_tokens=n, temperature=0.05)[0].tolist()


def test_greedy_equals_the_origins(model, decoder):
    for prompt in ([5], [5, 6, 7], list(range(3, 50))):
        ours = decoder.generate_super(torch.tensor([prompt]), max_new_tokens=60)
        assert ours.dtype == torch.int64 and ours.shape == (1, 60)
        assert ours[0].tolist() == origin_greedy(model, prompt, 60)


def test_greedy_at_the_default_temperature(decoder):
    """Repaired: the origin draws here."""
    results = {tuple(decoder.generate_super(torch.tensor([[5, 6]]), max_new_tokens=10)[0].tolist()) for _ in range(3)}
    assert len(results) == 1


def test_positional_arguments_in_the_origins_order(decoder):
    ids = torch.tensor([[5, 6]])
    torch.manual_seed(1)
    a = decoder.generate_super(ids, None, 10, 0.7, 8, True, 1)
    torch.manual_seed(1)
    b = decoder.generate_super(idx=ids, stop_id=None, max_new_tokens=10, temperature=0.7, top_k=8, do_sample=True, num_beams=1)
    assert torch.equal(a, b)


def test_batches_with_padding_on_either_side(decoder):
    """Repaired: the origin reads padded rows at the wrong place."""
    alone = [decoder.generate_super(torch.tensor([p]), max_new_tokens=12)[0] for p in ([5, 6, 7], [9])]
    for ids, mask in (([[5, 6, 7], [0, 0, 9]], [[1, 1, 1], [0, 0, 1]]), ([[5, 6, 7], [9, 0, 0]], [[1, 1, 1], [1, 0, 0]])):
        out = decoder.generate_super(torch.tensor(ids), max_new_tokens=12, attention_mask=torch.tensor(mask))
        assert torch.equal(out, torch.stack(alone))


def test_rows_end_by_themselves_and_are_padded(decoder):
    ids = torch.tensor([[5, 6], [9, 3]])
    free = decoder.generate_super(ids, max_new_tokens=20)
    stop = int(free[0, 4])
    assert stop not in free[0, :4].tolist() and stop not in free[1].tolist(), "choose another prompt"
    out = decoder.generate_super(ids, stop_id=stop, max_new_tokens=20, pad_token_id=1)
    assert out[0].tolist() == free[0, :5].tolist() + [1] * 15
    assert out[1].tolist() == free[1].tolist()
    assert decoder.generate_super(ids, stop_id=stop, max_new_tokens=20)[0, 5:].unique().tolist() == [stop]
    assert decoder.generate_super(ids[:1], stop_id=stop, max_new_tokens=20).shape == (1, 5)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"temperature": 0.0, "do_sample": True}])
def test_no_temperature_is_greedy(decoder, options):
    ids = torch.tensor([[5, 6]])
    assert torch.equal(decoder.generate_super(ids, max_new_tokens=9, **options), decoder.generate_super(ids, max_new_tokens=9))


def test_draws_have_the_origins_distribution(model, decoder):
    """Frequencies of the first token against the origin's own softmax(logits / T) over its top-k, by chi-square."""
    from scipy.stats import chisquare

    ids, n = torch.tensor([[5, 6]]), 4000
    with torch.no_grad():
        logits = model(ids).logits[0, -1] / 0.8
    kept = logits >= logits.topk(10).values[-1]
    p = torch.softmax(logits.masked_fill(~kept, float("-inf")), -1)
    torch.manual_seed(0)
    drawn = decoder.generate_super(ids.repeat(n, 1), max_new_tokens=1, temperature=0.8, top_k=10, do_sample=True)[:, 0]
    counts = torch.bincount(drawn, minlength=64)
    assert counts[~kept].sum() == 0
    expected = p[kept].double()
    assert chisquare(counts[kept].numpy(), (expected / expected.sum() * n).numpy()).pvalue > 1e-6


def test_beams_of_the_origins_rule_equal_the_origins(model, decoder):
    """Token for token, its quirks included: it writes past the stop token, and temperature 0 makes beams greedy."""
    rng, past, ended = random.Random(0), 0, 0
    for _ in range(12):
        ids = torch.tensor([[rng.randrange(64) for _ in range(rng.randint(1, 20))]])
        options = {"max_new_tokens": 16, "temperature": rng.choice([1.0, 2.0, 4.0, 0.0]), "top_k": rng.choice([None, 1, 3, 20])}
        options["num_beams"] = rng.choice([2, 3, 5])
        free = model.generate_super(ids, **options)[0].tolist()
        for stop in {None, *free}:
            ours = decoder.generate_super(ids, stop, compat="origin", **options)[0].tolist()
            assert ours == model.generate_super(ids, stop, **options)[0].tolist(), (ids, stop, options)
            past += stop in ours[:-1]
            ended += ours[-1] == stop and len(ours) < 16
    assert past > 3 and ended > 3, (past, ended)


def test_beams_repaired(model, decoder):
    """In batches, with padding; ended beams are kept, and go on no more; temperature and top-k shape each beam."""
    prompts = [[5, 6, 7], [9], [3, 3]]
    ids, mask = torch.tensor([[5, 6, 7], [0, 0, 9], [0, 3, 3]]), torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]])
    stop = origin_greedy(model, prompts[0], 5)[3]
    for more in ({}, {"temperature": 0.7, "top_k": 5}, {"temperature": 3.0}, {"temperature": 0.0}):
        out = decoder.generate_super(ids, stop_id=stop, max_new_tokens=12, num_beams=4, attention_mask=mask, pad_token_id=1, **more)
        for prompt, row in zip(prompts, out.tolist(), strict=True):
            best = decoder.generate(
                prompt, num_beams=4, length_penalty=0.0, max_new_tokens=12, eos_token_id=stop,
                **{**more, "temperature": more.get("temperature") or None},
            )[0]  # fmt: skip
            assert row[: len(best.token_ids)] == best.token_ids and set(row[len(best.token_ids) :]) <= {1}
            assert stop not in best.token_ids[:-1]
    assert torch.equal(
        decoder.generate_super(ids, max_new_tokens=9, num_beams=4, temperature=0.0, attention_mask=mask),
        decoder.generate_super(ids, max_new_tokens=9, num_beams=4, attention_mask=mask),
    )


def test_beams_that_are_drawn_repeat_with_the_seed(decoder):
    results = []
    for seed in (1, 1, 2, 3):
        torch.manual_seed(seed)
        results.append(decoder.generate_super(torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=True, num_beams=3).tolist())
    assert results[0] == results[1] and len(set(map(str, results))) > 1


def test_what_it_refuses(decoder):
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="num_beams is 65; it must be at most the model's vocabulary of 64"):
        decoder.generate_super(ids, max_new_tokens=9, num_beams=65)
    with pytest.raises(TypeError, match="num_beams is 2.5; it must be an integer"):
        decoder.generate_super(ids, max_new_tokens=9, num_beams=2.5)
    with pytest.raises(ValueError, match="compat is 'hf'; it must be None or 'origin'"):
        decoder.generate_super(ids, max_new_tokens=9, num_beams=2, compat="hf")
    with pytest.raises(ValueError, match="max_new_tokens is 200; after the 2 tokens of prompt 0 the model's length of 128 allows 126"):
        decoder.generate_super(ids, max_new_tokens=200)
