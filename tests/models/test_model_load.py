"""Loading: every kind of source gives the same weights, live ones are shared, and bad ones are refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import TOLERANCE, hf_logits, hf_model, run_logits, some_tokens
from real_configs import VARIANTS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.kernels import PackedWeight, select
from engine.models import LoadedModel, Transformer, load
from engine.models.checkpoint import open_tensors, weight_files
from engine.models.families import find_family
from engine.models.weights import Assembler

LLAMA = VARIANTS["llama-3.1-8b"]
TIED = VARIANTS["qwen2-0.5b"]


def flat(loaded: LoadedModel) -> list[Tensor]:
    """Every tensor of a loaded model, in one order; packed ones as they were."""
    weights = loaded.model.weights
    tensors: list[Tensor | PackedWeight] = []
    for layer in weights.layers:
        for value in vars(layer).values():
            tensors += value if isinstance(value, tuple) else [] if value is None else [value]
    tensors = [weights.embedding, *tensors, weights.final_norm, weights.head]
    return [tensor.dense() if isinstance(tensor, PackedWeight) else tensor for tensor in tensors]


def said(caplog: pytest.LogCaptureFixture) -> str:
    """What loading logged (the choice of kernels may have logged as well)."""
    return " ".join(record.getMessage() for record in caplog.records if record.name == "engine.models")


def saved(model: Any, folder: Path, *, shards: int = 1, pickled: bool = False, raw: dict[str, Any] | None = None) -> Path:
    """A folder as published ones are: config.json and weights without tied copies."""
    folder.mkdir()
    config = {**(LLAMA if raw is None else raw)}
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = sorted(state)
    parts = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{ending}"
        tensors = {name: state[name] for name in part}
        if pickled:
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("raw", [LLAMA, TIED], ids=["untied", "tied"])
def test_all_sources_give_the_same_weights(raw: dict[str, Any], tmp_path: Path) -> None:
    model = hf_model(raw)
    live = load(model)
    assert live.name == type(model).__name__ and live.tokenizer_path is None
    sources = {
        "single": saved(model, tmp_path / "single", raw=raw),
        "sharded": saved(model, tmp_path / "sharded", raw=raw, shards=3),
        "bin": saved(model, tmp_path / "bin", raw=raw, pickled=True),
        "bin shards": saved(model, tmp_path / "bins", raw=raw, pickled=True, shards=2),
        "transformers": tmp_path / "transformers",
    }
    model.save_pretrained(sources["transformers"])
    for kind, folder in sources.items():
        loaded = load(folder)
        assert loaded.name == folder.name
        assert loaded.config.tied_head == live.config.tied_head == raw["tie_word_embeddings"]
        for found, expected in zip(flat(loaded), flat(live), strict=True):
            assert torch.equal(found, expected), kind
    tokens = some_tokens(30, 211)
    for weights in ("shared", "packed"):
        ours, theirs = load(sources["sharded"], weights=weights), load(model, weights=weights)
        assert torch.equal(run_logits(ours.model, tokens), run_logits(theirs.model, tokens))


def test_live_weights_are_shared() -> None:
    model = hf_model(LLAMA)
    loaded = load(model)
    storages = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(tensor.data_ptr() in storages for tensor in flat(loaded))
    tokens = some_tokens(20, 211)
    before = run_logits(loaded.model, tokens)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(-1)
    after = run_logits(loaded.model, tokens)
    assert (after - before).abs().max() > 0.01 and (after - hf_logits(model, tokens)).abs().max() < TOLERANCE
    model.model.layers[1].self_attn.q_proj.weight.data = torch.zeros(128, 128)  # another storage, as .to() gives
    moved = run_logits(loaded.model, tokens)
    assert (moved - after).abs().max() > 0.01 and (moved - hf_logits(model, tokens)).abs().max() < TOLERANCE


def test_tied_head_is_the_embedding() -> None:
    model = hf_model(TIED)
    weights = load(model).model.weights
    assert weights.head is weights.embedding and weights.head.data_ptr() == model.lm_head.weight.data_ptr()


def test_stored_copy_of_a_tied_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An equal copy is dropped, a different one wins over the config with a warning, as in transformers 5."""
    model = hf_model(TIED)
    folder = saved(model, tmp_path / "m", raw=TIED)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert load(folder).config.tied_head and not said(caplog)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] * 2}, folder / "model.safetensors")
    loaded = load(folder)
    assert not loaded.config.tied_head and "ties the head" in said(caplog)
    tokens = some_tokens(20, 211)
    assert (run_logits(loaded.model, tokens) - 2 * hf_logits(model, tokens)).abs().max() < 2 * TOLERANCE


def test_wrapped_live_models() -> None:
    model = hf_model(TIED)
    compiled = torch.compile(model, backend="eager")
    assert load(compiled).model.weights.embedding.data_ptr() == model.lm_head.weight.data_ptr()
    assert load(nn.DataParallel(model)).name == "Qwen2ForCausalLM"
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert len(load(model).model.weights.layers) == 3


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_conversion(dtype: Any, pickled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = hf_model(LLAMA)
    target = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    loaded = load(saved(model, tmp_path / "m", pickled=pickled), dtype=dtype)
    assert loaded.config.dtype == target
    for ours, theirs in zip(flat(loaded), flat(load(model)), strict=True):
        assert torch.equal(ours, theirs.to(target))
    assert not said(caplog)
    live = load(model, dtype=dtype)
    assert "copy" in said(caplog) and live.config.dtype == target and not any(t.requires_grad for t in flat(live))
    assert load(model, dtype=torch.float32).model.weights.embedding.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_not_contiguous_parameters_are_copied_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = hf_model(LLAMA)
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight.data = weight.data.T.contiguous().T
    loaded = load(model)
    assert said(caplog).count("not contiguous") == 1 and "mlp.gate_proj.weight" in said(caplog)
    tokens = some_tokens(20, 211)
    assert (run_logits(loaded.model, tokens) - hf_logits(model, tokens)).abs().max() < TOLERANCE


def test_special_tokens(tmp_path: Path) -> None:
    model = hf_model(LLAMA)
    folder = saved(model, tmp_path / "m")
    assert load(folder).config.eos_token_ids == (2, 3)
    generation = {"eos_token_id": [7, 2, 7], "bos_token_id": 5, "pad_token_id": 6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = load(folder).config
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((7, 2), 5, 6)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "temperature": 0.6}))
    assert load(folder).config.eos_token_ids == (2, 3)
    model.generation_config.eos_token_id = 9
    assert load(model).config.eos_token_ids == (9,)
    model.generation_config = None
    assert load(model).config.eos_token_ids == (2, 3)


def test_tokenizer_folder(tmp_path: Path) -> None:
    folder = saved(hf_model(LLAMA), tmp_path / "m")
    assert load(folder).tokenizer_path is None
    (folder / "tokenizer.json").write_text("{}")
    assert load(folder).tokenizer_path == folder
    model = hf_model(LLAMA)
    model.config._name_or_path = str(folder)  # where from_pretrained read it
    assert load(model).tokenizer_path == folder


def test_max_position() -> None:
    model = hf_model(LLAMA)
    loaded = load(model, max_position=40)
    assert loaded.config.max_position == 40 and loaded.model.cos.shape[0] == 40
    with pytest.raises(ValueError, match="max_position is 513.*between 1 and the model's 512"):
        load(model, max_position=513)


def test_old_tables_in_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    folder = saved(hf_model(LLAMA), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / "model.safetensors")
    load(folder)


# ---- what is refused ----


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    folder = saved(hf_model(LLAMA), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    for name in list(state):
        if "input_layernorm" in name or "v_proj" in name:
            del state[name]
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(88, 5)
    state["model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 4)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert "6 missing: model.layers.0.input_layernorm.weight [128]" in message and "and 1 more" in message
    assert "1 of another shape: model.layers.0.mlp.up_proj.weight expected [88, 128], found [88, 5]" in message
    assert "1 unknown: model.layers.1.self_attn.q_proj.lora_A.weight [4, 4]" in message


def test_dtypes_that_cannot_be_read(tmp_path: Path) -> None:
    folder = saved(hf_model(LLAMA), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**state, name: state[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has dtype torch.float8_e4m3fn; allowed are float32, bfloat16, float16; quantised"):
        load(folder)
    save_file({**state, name: state[name].double()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has dtype torch.float64;.*pass dtype="):
        load(folder)
    assert load(folder, dtype="float32").config.dtype == torch.float32
    save_file({**state, name: state[name].bfloat16()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="must have one dtype: .*gate_proj torch.float32, .*up_proj torch.bfloat16; pass dtype="):
        load(folder)
    with pytest.raises(ValueError, match="dtype = 'int8' is not supported; allowed: float32, bfloat16, float16"):
        load(folder, dtype="int8")


def test_paths_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'.*nowhere' does not exist$"):
        load(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json$"):
        load(empty)
    (empty / "weights.pth").touch()
    with pytest.raises(FileNotFoundError, match="no config.json; to load an origin checkpoint pass the file itself, e.g. .*weights.pth"):
        load(empty)
    with pytest.raises(ValueError, match="weights.pth is empty"):
        load(empty / "weights.pth")
    (empty / "weights.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load(empty / "weights.pth")
    (empty / "weights.pth").write_bytes(b"PK and then nothing of a zip")
    with pytest.raises(ValueError, match="weights.pth is not a readable state dict"):
        load(empty / "weights.pth")
    (empty / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="notes.txt is no checkpoint: expected a folder"):
        load(empty / "notes.txt")
    (empty / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load(empty)
    (empty / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds a list, not an object"):
        load(empty)
    (empty / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mixtral"}))
    with pytest.raises(ValueError, match="model_type 'mixtral'"):
        load(empty)
    (empty / "weights.pth").unlink()
    (empty / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(FileNotFoundError, match="has no weights: none of model.safetensors.index.json"):
        load(empty)


def test_broken_weights(tmp_path: Path) -> None:
    folder = saved(hf_model(LLAMA), tmp_path / "m", shards=3)
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of the 3 shards in .*: model-00002-of-00003.safetensors"):
        load(folder)
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is not a readable safetensors file"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="'../elsewhere.safetensors', which is not a file name"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load(folder)


class Evil:
    """A pickle that would run code if it were loaded without care."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("should-not-appear"),))


def test_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="not a readable state dict"):
        load(path)
    assert not (tmp_path / "should-not-appear").exists()
    torch.save({"model": {"w": torch.zeros(1)}, "optimizer": {}}, path)
    with pytest.raises(ValueError, match="holds a dict with keys model, optimizer, not named tensors; save model.state_dict"):
        load(path)
    torch.save(hf_model(LLAMA).state_dict(), path)
    with pytest.raises(ValueError, match="not a checkpoint of the origin model .it holds model.embed_tokens.weight.*config.json"):
        load(path)
    torch.save({"tok_embeddings.weight": torch.zeros(3), "layers.0.attention.wq.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"tok_embeddings.weight should be a matrix, found \[3\]"):
        load(path)


def test_old_pickle_format(tmp_path: Path) -> None:
    """Not a zip, so it cannot be mapped."""
    model = hf_model(LLAMA)
    folder = saved(model, tmp_path / "m", pickled=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load(folder).model.weights.embedding, model.model.embed_tokens.weight)


def test_live_models_that_cannot_be_used() -> None:
    model = hf_model(LLAMA)
    with pytest.raises(ValueError, match="class 'LlamaModel' of model_type 'llama' is not supported"):
        load(model.model)
    with pytest.raises(ValueError, match="model is a Linear.*known families: llama, mistral"):
        load(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a dict"):
        load({})
    with pytest.raises(ValueError, match="LlamaForCausalLM is on device meta; it must be on one of cpu, cuda"):
        load(model.to("meta"))


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    folder = saved(hf_model(LLAMA), tmp_path / "snapshot")
    asked: list[str] = []

    def snapshot(repository: str, **options: Any) -> str:
        asked.append(repository)
        if repository == "owner/absent":
            raise OSError("no route to the hub\nand much more")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load("owner/model").name == "owner/model"
    with pytest.raises(
        FileNotFoundError, match="'owner/absent' does not exist, and the Hugging Face hub did not give it: no route to the hub$"
    ):
        load("owner/absent")
    for path in ("model", "./owner/model", "~/model", "owner/model.pth", "a/b/c", "../model"):
        with pytest.raises(FileNotFoundError, match="does not exist$"):
            load(path)
    assert asked == ["owner/model", "owner/absent"]
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="install huggingface_hub"):
        load("owner/model")


# ---- devices ----


def test_device_that_is_not_there(tmp_path: Path) -> None:
    model = hf_model(LLAMA)
    folder = saved(model, tmp_path / "m")
    for source in (model, folder):
        for bad in ("meta", "gpu", 3.5):
            with pytest.raises(ValueError, match=f"device is '{bad}'; it must be one of cpu, cuda, with a number or without, or None"):
                load(source, device=bad)  # type: ignore[arg-type]
        assert load(source, device="cpu").model.device == torch.device("cpu")
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="device is 'cuda', and torch finds no CUDA GPU"):
                load(source, device="cuda")


def test_live_model_on_two_devices() -> None:
    model = hf_model(LLAMA)
    model.model.norm.to("meta")
    message = "LlamaForCausalLM must lie on one device, and model.embed_tokens.weight is on cpu while model.norm.weight is on meta"
    with pytest.raises(ValueError, match=message):
        load(model)


def test_tensors_go_to_another_device(tmp_path: Path) -> None:
    """All of them, those of the tables too; "meta" stands for a GPU, as what is there has no values to compare."""
    model = hf_model(LLAMA)
    folder = saved(model, tmp_path / "m")
    loaded = load(folder, weights="shared", dtype="bfloat16")
    names, meta = find_family("llama", ("LlamaForCausalLM",)).names, torch.device("meta")
    built = Assembler(loaded.config, names, open_tensors(weight_files(folder)), "m", torch.bfloat16, meta, "shared").build()
    moved = replace(loaded, model=Transformer(loaded.config, built, select("meta")))
    assert moved.model.device == meta
    for ours, theirs in zip(flat(loaded), flat(moved), strict=True):
        assert (theirs.device, theirs.shape, theirs.dtype) == (meta, ours.shape, ours.dtype)
    assert moved.model.cos.device == moved.model.sin.device == meta
