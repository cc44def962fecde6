"""llama.cpp through its C API: sequences side by side in one context, one ``llama_decode`` for each step of the batch. Quantised by its
own quantiser, all matrices alike (``pure``), int8 to Q8_0 and int4 to Q4_0. It has no beam search."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peers import Timing, converted, missing, version_of

POSITIONS, BATCH = 2048, 512  # of the context per sequence at most; tokens of one llama_decode
FILE_TYPES = {"bf16": "BF16", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


class Adapter:
    name = "llama_cpp"
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16", "int8", "int4")
    beams = False

    def __init__(self) -> None:
        self._model: Any = None
        self._context: Any = None
        self._size = (0, 0)

    def unavailable(self) -> str | None:
        return missing("llama_cpp", "gguf", "safetensors", "numpy")

    def version(self) -> str:
        return version_of("llama-cpp-python")

    def load(self, folder: Path, dtype: str, num_threads: int) -> None:
        import llama_cpp as C

        @C.llama_log_callback
        def silent(level: int, text: bytes, data: Any) -> None:
            pass

        self._silent = silent  # as long as it may be called
        C.llama_log_set(silent, None)
        C.llama_backend_init()
        self._free()
        self._threads, self._dtype = num_threads, dtype
        full = converted(folder, "llama_cpp-fp32", lambda target: write_gguf(folder, target / "model.gguf")) / "model.gguf"

        def quantise(target: Path) -> None:
            params = C.llama_model_quantize_default_params()
            params.ftype, params.pure, params.nthread = getattr(C, f"LLAMA_FTYPE_MOSTLY_{FILE_TYPES[dtype]}"), True, num_threads
            if C.llama_model_quantize(str(full).encode(), str(target / "model.gguf").encode(), params) != 0:
                raise RuntimeError(f"llama.cpp could not quantise {full}")

        path = full if dtype == "fp32" else converted(folder, f"llama_cpp-{self.version()}-{dtype}", quantise) / "model.gguf"
        self._model = C.llama_model_load_from_file(str(path).encode(), C.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self._vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self._model))

    def decode(self, prompts: list[list[int]], new_tokens: int, num_beams: int = 1) -> Timing:
        assert num_beams == 1
        length = len(prompts[0])
        self._fit(len(prompts), length + new_tokens)
        begin = time.perf_counter()
        tokens = [[self._prompt(i, prompt)] for i, prompt in enumerate(prompts)]
        start = time.perf_counter()
        for step in range(new_tokens - 1):
            rows = self._step((i, length + step, ids[-1], True) for i, ids in enumerate(tokens))
            for ids, row in zip(tokens, rows, strict=True):
                ids.append(row)
        end = time.perf_counter()
        return Timing(end - start, end - begin, tokens)

    def prefill(self, tokens: list[int]) -> float:
        self._fit(1, len(tokens) + 1)
        start = time.perf_counter()
        self._prompt(0, tokens)
        return time.perf_counter() - start

    def _prompt(self, sequence: int, prompt: list[int]) -> int:
        for at in range(0, len(prompt), BATCH):
            part = prompt[at : at + BATCH]
            rows = self._step((sequence, at + i, token, at + i + 1 == len(prompt)) for i, token in enumerate(part))
        return rows[-1]

    def _step(self, entries: Iterable[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (sequence, position, token, whether logits are wanted) each; the best token after those that want them."""
        import llama_cpp as C
        import numpy as np

        batch, n, wanted = self._batch, 0, []
        for sequence, position, token, logits in entries:
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, position, 1, logits
            batch.seq_id[n][0] = sequence
            if logits:
                wanted.append(n)
            n += 1
        batch.n_tokens = n
        if C.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [int(np.ctypeslib.as_array(C.llama_get_logits_ith(self._context, i), (self._vocab,)).argmax()) for i in wanted]

    def _fit(self, sequences: int, length: int) -> None:
        """A cleared context for so many sequences of that length."""
        import llama_cpp as C

        if self._context is None or self._size != (sequences, length):
            self._free_context()
            params = C.llama_context_default_params()
            params.n_seq_max, params.n_batch, params.n_ubatch = sequences, BATCH, BATCH
            params.n_ctx = sequences * -(-length // 256) * 256
            if self._dtype == "fp32":
                params.type_k = params.type_v = C.GGML_TYPE_F32  # the default is float16
            params.n_threads = params.n_threads_batch = self._threads
            self._context = C.llama_init_from_model(self._model, params)
            if not self._context:
                raise RuntimeError(f"llama.cpp could not make a context of {sequences} sequences")
            self._size, self._batch = (sequences, length), C.llama_batch_init(BATCH, 0, 1)
        C.llama_memory_clear(C.llama_get_memory(self._context), True)

    def _free_context(self) -> None:
        import llama_cpp as C

        if self._context is not None:
            C.llama_batch_free(self._batch)
            C.llama_free(self._context)
            self._context = None

    def _free(self) -> None:
        import llama_cpp as C

        self._free_context()
        if self._model is not None:
            C.llama_model_free(self._model)
            self._model = None


def write_gguf(folder: Path, path: Path, words: bool = False) -> None:
    """The Hugging Face Llama in ``folder`` as a float32 GGUF file. llama.cpp rotates neighbouring components where Hugging Face rotates
    halves, so that rows of q and k change places within each head.

    Args:
        words: with a vocabulary in which token i is the text ``t<i>`` and a space, else without one.
    """
    import json

    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads, hidden = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10_000.0))
    if words:
        writer.add_tokenizer_model("rwkv")  # takes the longest token that the text goes on with
        writer.add_token_list([f"t{i} ".encode() for i in range(config["vocab_size"])])
        writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
        writer.add_add_bos_token(False)
    else:
        writer.add_tokenizer_model("no_vocab")
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight",
    } | {
        f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{ours}.weight"
        for i in range(config["num_hidden_layers"])
        for theirs, ours in (
            ("input_layernorm", "attn_norm"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
        )
    }  # fmt: skip
    for theirs, tensor in load_file(folder / "model.safetensors").items():
        if theirs.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in theirs else kv_heads
            rows, columns = tensor.shape
            tensor = tensor.reshape(n, 2, rows // n // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(names[theirs], np.ascontiguousarray(tensor, dtype=np.float32))
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
