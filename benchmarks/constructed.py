"""Models whose function is known and whose cost is that of a model of 100 M parameters: the bundled target in a wider, deeper body, and a
model that copies its prompt with small changes. Real configurations of their family (Llama), so that peers run them too.

What does no work is random, of the size it has in the models it stands in for: it is read and multiplied like everything else, and its
results meet zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, LAYERS, FFN, HEAD_DIM = 1024, 8, 2816, 64  # 16 heads on 8 KV heads
POSITIONS = 2048
ROPE_THETA = 10_000.0


def body(vocab_size: int, *, tied: bool, eps: float) -> LlamaForCausalLM:
    """Random, but nothing is ever added to the residual stream."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=8, head_dim=HEAD_DIM, max_position_embeddings=POSITIONS, tie_word_embeddings=tied, rms_norm_eps=eps,
        rope_theta=ROPE_THETA, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return model


def widened(small: LlamaForCausalLM) -> LlamaForCausalLM:
    """The function of the bundled target (hidden 256, 6 layers, 4 heads on 2 KV heads) with 18 times its parameters, in float32.

    The residual stream is the small one and 768 zeros. A mean of squares over four times as many numbers is a quarter, so norms have half
    the weight and a quarter of the epsilon: exact, in bfloat16 too. The 4 heads and the 704 neurons have their places among others, whose
    way out is zero, and the 6 layers among 8.
    """
    with torch.no_grad():
        config = small.config
        width, ratio = config.hidden_size, HIDDEN // config.hidden_size
        assert ratio * width == HIDDEN and ratio == 4 and config.head_dim == HEAD_DIM
        assert config.num_attention_heads // config.num_key_value_heads == 2 and config.tie_word_embeddings
        large = body(config.vocab_size, tied=True, eps=config.rms_norm_eps / ratio)
        table = large.model.embed_tokens.weight
        table.zero_()
        table[:, :width] = small.model.embed_tokens.weight
        large.model.norm.weight[:width] = small.model.norm.weight / 2
        for place, layer in zip((0, 1, 3, 4, 5, 7), small.model.layers, strict=True):
            into, attention, mlp = large.model.layers[place], layer.self_attn, layer.mlp
            into.input_layernorm.weight[:width] = layer.input_layernorm.weight / 2
            into.post_attention_layernorm.weight[:width] = layer.post_attention_layernorm.weight / 2
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(attention, name).weight
                getattr(into.self_attn, name).weight[: len(weight), :width] = weight
            into.self_attn.o_proj.weight[:width, : attention.o_proj.weight.shape[1]] = attention.o_proj.weight
            for name in ("gate_proj", "up_proj"):
                weight = getattr(mlp, name).weight
                getattr(into.mlp, name).weight[: len(weight), :width] = weight
            into.mlp.down_proj.weight[:width, : mlp.down_proj.weight.shape[1]] = mlp.down_proj.weight
    return large


def copier(text: list[int], vocab_size: int, renamed: Mapping[int, int], surprise: float, temperature: float) -> LlamaForCausalLM:
    """A model that after a text of this length writes it again, with the tokens ``renamed``, in float32.

    Drawn at ``temperature``, a token is another one than that with a probability of ``surprise``; the copy goes on in its place.

    Tokens have random signs as embeddings, and one component that is the same for all. From that one the heads of the first layer make
    queries and keys of one direction each, turned against each other so that RoPE makes them meet ``len(text) - 1`` places apart: there
    stands the token whose copy comes next. Its signs pass through values and output to the LM head, whose rows are the signs of the tokens.
    """
    code, same = HIDDEN // 2, HIDDEN - 1  # so many signs as there are values of 8 heads
    pairs, size, gain = HEAD_DIM // 2, 16.0, 8.0
    model = body(vocab_size, tied=False, eps=1e-6)
    with torch.no_grad():
        signs = torch.randint(0, 2, (vocab_size, code), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
        table = model.model.embed_tokens.weight
        table.zero_()
        table[:, :code] = signs
        table[:, same] = 1.0
        attention = model.model.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.zero_()
        # The scores are a sum of cosines, size^2 / 4 each; its peak is 70 above its neighbours, so that nothing else is seen.
        turn = (len(text) - 1) * ROPE_THETA ** (-torch.arange(pairs) / pairs)
        attention.q_proj.weight.view(16, 2, pairs, HIDDEN)[:, 0, :, same] = size
        attention.k_proj.weight.view(8, 2, pairs, HIDDEN)[:, 0, :, same] = size * turn.cos()
        attention.k_proj.weight.view(8, 2, pairs, HIDDEN)[:, 1, :, same] = size * turn.sin()
        attention.v_proj.weight[:, :code] = torch.eye(code)
        # Two query heads read one KV head; the first of them passes it on.
        out = torch.eye(code).view(code, 8, 1, HEAD_DIM) * torch.tensor([gain, 0.0]).view(2, 1)
        attention.o_proj.weight[:code] = out.view(code, HIDDEN)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :code].index_add_(0, torch.tensor([renamed.get(token, token) for token in range(vocab_size)]), signs)
        # How far the logits lie apart, and so the surprise, is a matter of their scale.
        tokens = torch.tensor([text + text[:64]])
        logits = model(tokens).logits[0, len(text) - 1 : -1]
        wanted = torch.tensor([renamed.get(token, token) for token in text[:64]])[:, None]
        low, high = 0.0, 1.0
        for _ in range(40):
            scale = (low + high) / 2
            certain = (logits.double() * scale / temperature).softmax(dim=1).gather(1, wanted).mean()
            low, high = (scale, high) if 1 - certain > surprise else (low, scale)
        model.model.norm.weight.fill_(high)
    return model
