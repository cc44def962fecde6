"""The origin model: live, as a checkpoint file, as an exported folder; logits, sharing, and what a bare state dict cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import BACKENDS, TOLERANCE, ops_of, randomise, run_logits, some_tokens
from origin_model import OriginConfig, Transformer
from torch import Tensor, nn

from engine.models import load

SMALL = {"dim": 96, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 211, "max_seq_len": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "default heads of 48": {"n_layers": 1, "vocab_size": 97},  # dim 768, 16 heads, 8 KV heads, width 2048
    "215M heads of 64": {"dim": 256, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 211},
    "every head its own keys": {**SMALL, "n_kv_heads": None},
    "odd widths": {**SMALL, "hidden_dim": 100, "norm_eps": 1e-3, "dropout": 0.1},
}


def origin_model(**fields: Any) -> Transformer:
    model = Transformer(OriginConfig(**fields)).eval()
    randomise(model)
    return model


def all_logits(model: Transformer, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model.all_logits(torch.tensor([tokens]))[0]


def export(model: Transformer, folder: Path, state: dict[str, Tensor] | None = None) -> Path:
    """The folder the origin's export script writes, without its code."""
    folder.mkdir()
    config = {**model.args.to_dict(), "auto_map": {"AutoModelForCausalLM": "k_model.Transformer"}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict() if state is None else state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_live_logits(shape: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = origin_model(**SHAPES[shape])
    tokens = some_tokens(60, model.args.vocab_size)
    expected = all_logits(model, tokens)
    assert expected.std() > 0.1
    monkeypatch.setattr(Transformer, "forward", lambda *args: pytest.fail("the model's own forward was called"))
    loaded = load(model, ops=ops_of(backend))
    assert loaded.config.tied_head and loaded.config.rope.interleaved
    for chunks in (None, [33, 1, 1, 25]):
        assert (run_logits(loaded.model, tokens, chunks) - expected).abs().max() < TOLERANCE


def test_sizes_of_the_published_model() -> None:
    from engine.models.origin import read_config

    config = read_config({"dim": 1024, "n_layers": 18})
    assert (config.ffn_size, config.head_dim, config.num_kv_heads, config.vocab_size, config.max_position) == (2752, 64, 8, 6144, 512)
    assert read_config({}).ffn_size == 2048 and read_config({}).head_dim == 48


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_checkpoint_file(prefix: str, tmp_path: Path) -> None:
    model = origin_model(**SMALL)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    assert len(state) == 9 * 3 + 3
    path = tmp_path / "pretrain_96_3_211.pth"
    torch.save(state, path)
    loaded = load(path, origin_config={"n_heads": 4, "max_seq_len": 128})
    assert loaded.name == "pretrain_96_3_211" and loaded.tokenizer_path is None
    assert (loaded.config.num_heads, loaded.config.num_kv_heads, loaded.config.head_dim, loaded.config.ffn_size) == (4, 2, 24, 256)
    assert loaded.config.num_layers == 3 and loaded.config.max_position == 128 and loaded.config.tied_head
    tokens = some_tokens(40, 211)
    assert (run_logits(loaded.model, tokens) - all_logits(model, tokens)).abs().max() < TOLERANCE
    # the origin's own config object does as well
    assert load(path, origin_config=model.args).config == loaded.config


def test_checkpoint_file_defaults(tmp_path: Path) -> None:
    model = origin_model(dim=768, n_layers=1, vocab_size=97, hidden_dim=64)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    config = load(str(tmp_path / "model.pt")).config
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_position, config.norm_eps) == (16, 8, 48, 512, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exported_folder(backend: str, tmp_path: Path) -> None:
    model = origin_model(**SMALL)
    mask = {f"layers.{i}.attention.mask": torch.zeros(1, 1, 8, 8) for i in range(3)}  # saved where torch has no fused attention
    folder = export(model, tmp_path / "exported", {**model.state_dict(), **mask})
    loaded = load(folder, ops=ops_of(backend))
    assert loaded.name == "exported" and loaded.config.family == "Tiny-K" and loaded.config.eos_token_ids == ()
    tokens = some_tokens(40, 211)
    assert (run_logits(loaded.model, tokens) - all_logits(model, tokens)).abs().max() < TOLERANCE


def test_live_weights_are_shared() -> None:
    model = origin_model(**SMALL)
    loaded = load(model)
    weights = loaded.model.weights
    assert weights.embedding is weights.head and weights.embedding.data_ptr() == model.output.weight.data_ptr()
    layer: Any = model.layers[1]
    assert [w.data_ptr() for w in weights.layers[1].qkv] == [getattr(layer.attention, n).weight.data_ptr() for n in ("wq", "wk", "wv")]
    tokens = some_tokens(20, 211)
    before = run_logits(loaded.model, tokens)
    with torch.no_grad():
        layer.feed_forward.w2.weight.mul_(1.5)
    after = run_logits(loaded.model, tokens)
    assert (after - before).abs().max() > 0.01
    assert (after - all_logits(model, tokens)).abs().max() < TOLERANCE


def test_untied_copies_are_both_used(caplog: pytest.LogCaptureFixture) -> None:
    model = origin_model(**SMALL)
    model.tok_embeddings.weight = nn.Parameter(model.output.weight.detach() * 0.5)
    loaded = load(model)
    assert not loaded.config.tied_head and "differ" in caplog.text
    tokens = some_tokens(20, 211)
    assert (run_logits(loaded.model, tokens) - all_logits(model, tokens)).abs().max() < TOLERANCE


def test_another_rope_is_refused() -> None:
    model = origin_model(**SMALL)
    model.freqs_cos = model.freqs_cos.roll(1, 0)
    with pytest.raises(ValueError, match="freqs_cos"):
        load(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (None, "head_dim 6 is not supported.*n_heads 16 was assumed.*pass origin_config"),
        ({"n_heads": 5}, "n_heads 5 does not fit dim 96 .*wk.weight$"),
        ({"n_heads": 2, "max_seq_len": 0}, "max_seq_len"),
        ({"heads": 4}, "unknown 'heads'; known are dim"),
        ({"n_heads": 4, "n_layers": 2}, "unknown: layers.2"),
        ({"n_heads": 4, "dim": 192}, "of another shape: tok_embeddings.weight expected .211, 192., found .211, 96."),
    ],
)
def test_what_a_state_dict_cannot_tell(overrides: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    torch.save(origin_model(**SMALL).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model.pth", origin_config=overrides)


def test_generate_super_of_the_yardstick() -> None:
    """The yardstick itself: greedy is what beams of a sharp temperature find, and beams never do worse than greedy over few steps."""
    model = origin_model(**SMALL)
    prompt = torch.tensor([some_tokens(5, 211)])
    greedy = model.generate_super(prompt, temperature=0.0, max_new_tokens=6)
    assert torch.equal(greedy, model.generate(prompt, temperature=0.0, max_new_tokens=6))
    assert torch.equal(greedy, model.generate_super(prompt, temperature=0.0, num_beams=3, max_new_tokens=6))  # quirk 3

    def score(tokens: Tensor) -> float:
        logprobs = all_logits(model, torch.cat((prompt, tokens), dim=1)[0].tolist()).log_softmax(-1)
        return sum(logprobs[4 + i, token].item() for i, token in enumerate(tokens[0].tolist()))

    beams = model.generate_super(prompt, num_beams=4, max_new_tokens=3)
    assert score(beams) >= score(greedy[:, :3]) - 1e-5
    stop = int(greedy[0, 2])
    first = greedy[0].tolist().index(stop)
    assert model.generate(prompt, stop, temperature=0.0).tolist()[0] == greedy[0, :first].tolist()
    torch.manual_seed(0)
    draws = {tuple(model.generate_super(prompt, max_new_tokens=4)[0].tolist()) for _ in range(5)}
    assert len(draws) > 1  # quirk 1
