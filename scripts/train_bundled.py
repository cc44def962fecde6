"""Train the bundled model pair from the Python standard library's sources and save it as two Hugging Face folders.

    python scripts/train_bundled.py                      # the full run, into engine/bundled
    python scripts/train_bundled.py --quick --out quick  # a smoke run of the whole path, about two minutes on two CPU cores

The full run takes about 35 minutes on two CPU cores (3 s a step; 8 s and more where other work shares them).
A fixed seed and a fixed number of steps make the run repeatable; what it saw and reached is written to metrics.json and README.md beside
the models. The learning rate is constant and then falls to zero over the last part of the run, so a checkpoint of the constant part may be
resumed with another --steps and ends as a run started with that number would.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other when the machine is shared

import torch
import torch.nn.functional as F
from bundled_corpus import END, END_ID, Source, batches, encode_files, fingerprint, read_sources, train_tokenizer
from bundled_model import Llama, Muon
from bundled_report import measure, write_report
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 4096
POSITIONS = 2048
TOKENS_PER_STEP = 4096
MICRO_TOKENS = 2048
STAGES = ((0.0, 256), (0.7, 1024), (0.92, POSITIONS))  # (share of the run at which it starts, window): short windows are cheap
WARMUP_STEPS = 40
DECAY_FRACTION = 0.4
MUON_RATE, ADAM_RATE = 0.02, 3e-3
SOFT_SHARE = 0.7
SHAPES = {"target": (256, 6, 4, 2, 704), "draft": (128, 2, 2, 1, 352)}  # hidden, layers, heads, KV heads, ffn


def make_config(name: str) -> LlamaConfig:
    """The Hugging Face config of ``target`` or ``draft``."""
    hidden, layers, heads, kv_heads, ffn = SHAPES[name]
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        intermediate_size=ffn,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )


def rate(step: int, steps: int) -> float:
    """The share of the full learning rate at ``step``: linear up, constant, linear down to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_FRACTION * steps))


def stage_at(step: int, steps: int) -> int:
    """Index into STAGES."""
    return max(i for i, (start, _) in enumerate(STAGES) if step >= round(start * steps))


class Trainer:
    """Both models, their optimisers and the position in the run."""

    def __init__(self, steps: int, seed: int, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(seed)
        self.steps, self.seed, self.device = steps, seed, device
        self.step, self.seconds, self.losses = 0, 0.0, {"target": 0.0, "draft": 0.0}
        self.models = {name: Llama(make_config(name)).to(device) for name in SHAPES}
        self.run: dict[str, Any] = {name: torch.compile(m, dynamic=False) if compiled else m for name, m in self.models.items()}
        layers = [p for m in self.models.values() for p in m.model.layers.parameters()]
        matrices = [p for p in layers if p.ndim == 2]
        rest = [p for m in self.models.values() for p in m.parameters() if not any(p is q for q in matrices)]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, lr=MUON_RATE, weight_decay=0.1), MUON_RATE),
            (torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0), ADAM_RATE),
        ]

    def learn(self, batch: Tensor) -> None:
        """One optimiser step on ``batch [rows, context + 1]``."""
        parts = batch.to(self.device).split(max(1, MICRO_TOKENS // (batch.shape[1] - 1)))
        for part in parts:
            tokens, labels = part[:, :-1].contiguous(), part[:, 1:].flatten()
            logits = self.run["target"](tokens).flatten(0, 1)
            target_loss = F.cross_entropy(logits, labels)
            (target_loss / len(parts)).backward()
            soft = logits.detach().softmax(-1).mul_(SOFT_SHARE)
            soft.scatter_add_(1, labels[:, None], torch.full_like(soft[:, :1], 1 - SOFT_SHARE))
            draft_loss = F.cross_entropy(self.run["draft"](tokens).flatten(0, 1), soft)
            (draft_loss / len(parts)).backward()
            for name, loss in (("target", target_loss), ("draft", draft_loss)):
                self.losses[name] += 0.02 * (loss.item() - self.losses[name]) if self.losses[name] else loss.item()
        for optimizer, full in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = full * rate(self.step, self.steps)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1

    def train(self, files: list[Tensor], checkpoint: Path | None, every_seconds: float) -> None:
        """Run to the last step, with a progress bar, writing ``checkpoint`` now and then."""
        bar = tqdm(total=self.steps, initial=self.step, desc="training", unit="step", smoothing=0.02, mininterval=1.0)
        begin, before, saved = time.perf_counter(), self.seconds, time.perf_counter()
        for stage, (_, context) in enumerate(STAGES):
            stream = batches(files, TOKENS_PER_STEP // context, context, self.seed + 1000 * stage)
            for step in range(self.steps):
                if stage_at(step, self.steps) != stage:
                    continue
                batch = next(stream)
                if step < self.step:  # seen before the checkpoint
                    continue
                self.learn(batch)
                self.seconds = before + time.perf_counter() - begin
                bar.set_postfix({k: f"{v:.3f}" for k, v in self.losses.items()} | {"window": context}, refresh=False)
                bar.update()
                if checkpoint is not None and time.perf_counter() - saved > every_seconds:
                    self.save(checkpoint)
                    saved = time.perf_counter()
        bar.close()
        if checkpoint is not None:
            self.save(checkpoint)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "losses": self.losses,
            "models": {k: m.state_dict() for k, m in self.models.items()},
            "optimizers": [o.state_dict() for o, _ in self.optimizers],
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; with another number of steps only from the part of the run that both share."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        same = state["steps"] == self.steps
        if not same and state["step"] > round((1 - DECAY_FRACTION) * min(self.steps, state["steps"])):
            at = f"step {state['step']} of {state['steps']}"
            raise ValueError(f"{path}: {at} lies where the rate already falls; from here the run cannot end at step {self.steps}")
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def save_pair(models: dict[str, Llama], tokenizer: Tokenizer, out: Path) -> None:
    """Write ``out/target`` and ``out/draft`` as Hugging Face folders in bf16, after checking that transformers computes the same logits."""
    for name, model in models.items():
        reference = LlamaForCausalLM(make_config(name))
        missing = reference.load_state_dict(model.state_dict(), strict=False)
        if missing.unexpected_keys or missing.missing_keys not in ([], ["lm_head.weight"]):
            raise RuntimeError(f"{name}: parameter names differ from transformers': {missing}")
        tokens = torch.arange(1, 65)[None]
        with torch.inference_mode():
            ours = model(tokens.to(next(model.parameters()).device)).cpu()
            torch.testing.assert_close(reference(input_ids=tokens).logits, ours, rtol=1e-3, atol=1e-3)
        reference.bfloat16().save_pretrained(out / name)
        special: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=POSITIONS, clean_up_tokenization_spaces=False, **special
        )
        fast.save_pretrained(out / name)
        # The name that both transformers 4 and 5 know, instead of the one that the version at hand uses for itself.
        settings = out / name / "tokenizer_config.json"
        known = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        for file in (out / name).iterdir():
            file.chmod(0o644)


def load_saved(out: Path, device: torch.device) -> dict[str, nn.Module]:
    """The pair as saved (bf16 values, fp32 arithmetic)."""
    pair: dict[str, nn.Module] = {}
    for name in SHAPES:
        model = Llama(make_config(name))
        model.load_state_dict(LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32).state_dict(), strict=False)
        pair[name] = model.to(device)
    return pair


def describe(sources: list[Source], files: list[Tensor]) -> dict[str, Any]:
    """Size of one side of the split."""
    size, tokens = sum(s.size for s in sources), sum(len(f) for f in files)
    return {"files": len(files), "bytes": size, "tokens": tokens, "bytes_per_token": round(size / tokens, 3)}


def describe_model(model: nn.Module, name: str, folder: Path) -> dict[str, Any]:
    """Shape and size of one model."""
    hidden, layers, heads, kv_heads, ffn = SHAPES[name]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "folder_bytes": sum(f.stat().st_size for f in folder.iterdir()),
        **{"hidden_size": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn},
    }


def describe_run(trainer: Trainer, epoch_tokens: int, compiled: bool) -> dict[str, Any]:
    """How the run was made and what it took."""
    on_gpu = trainer.device.type == "cuda"
    hardware = torch.cuda.get_device_name(trainer.device) if on_gpu else f"{platform.machine()} CPU ({torch.get_num_threads()} threads)"
    total = trainer.steps * TOKENS_PER_STEP
    return {
        "command": f"python scripts/train_bundled.py --steps {trainer.steps} --seed {trainer.seed}" + " --compile" * compiled,
        **{"seed": trainer.seed, "steps": trainer.steps, "tokens_per_step": TOKENS_PER_STEP, "tokens": total},
        "epochs": round(total / epoch_tokens, 2),
        "stages": [{"first_step": round(start * trainer.steps), "context": context} for start, context in STAGES],
        **{"vocab_size": VOCAB, "positions": POSITIONS, "decay_fraction": DECAY_FRACTION, "soft_share": SOFT_SHARE},
        "last_losses": {k: round(v, 4) for k, v in trainer.losses.items()},
        **{"seconds": round(trainer.seconds, 1), "tokens_per_second": round(total / trainer.seconds, 1)},
        **{"device": hardware, "torch": torch.__version__},
    }


def parse() -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="Train the bundled model pair on the Python standard library's sources.")
    parser.add_argument("--out", type=Path, default=root / "engine" / "bundled", help="where to write target/, draft/ and README.md")
    parser.add_argument("--steps", type=int, default=700, help=f"optimiser steps of {TOKENS_PER_STEP} tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of the training (default: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models: about a fifth faster, needs a C++ compiler")
    parser.add_argument("--quick", action="store_true", help="12 steps and two held-out files, to see that everything works")
    parser.add_argument("--checkpoint", type=Path, help="write the state of the run here every --checkpoint-minutes, and at the end")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint if it exists")
    args = parser.parse_args()
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    steps = 12 if args.quick else args.steps

    sources = read_sources()
    sides = {"train": [s for s in sources if not s.held_out], "held_out": [s for s in sources if s.held_out]}
    if args.quick:
        sides["held_out"] = sorted(sides["held_out"], key=lambda s: s.size)[-2:]
    tokenizer = train_tokenizer([s.text for s in sides["train"]], VOCAB)
    tokens = {side: encode_files(tokenizer, some) for side, some in sides.items()}
    data = {side: describe(some, tokens[side]) for side, some in sides.items()}
    for side, facts in data.items():
        print(f"{side}: {facts['files']} files, {facts['bytes']:,} bytes, {facts['tokens']:,} tokens")
    print(f"{steps} steps of {TOKENS_PER_STEP} tokens on {device}")

    trainer = Trainer(steps, args.seed, device, args.compile)
    if args.resume and args.checkpoint.exists():
        trainer.load(args.checkpoint)
    trainer.train(tokens["train"], args.checkpoint, args.checkpoint_minutes * 60)

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    save_pair(trainer.models, tokenizer, out)
    pair = load_saved(out, device)
    on_device = {name: (lambda t, m=model: m(t.to(device))) for name, model in pair.items()}
    metrics = {
        "models": {name: describe_model(model, name, out / name) for name, model in pair.items()},
        "held_out": measure(on_device, tokens["held_out"], sides["held_out"], POSITIONS),
        "data": {"python": platform.python_version(), "sha256": fingerprint(sources), **data},
        "training": describe_run(trainer, data["train"]["tokens"], args.compile),
    }
    write_report(out, metrics, 12 if args.quick else 160)
    for name in SHAPES:
        print(f"{name}: {metrics['held_out'][name]['bits_per_byte']:.4f} held-out bits per byte")
    print(f"saved in {out}")


if __name__ == "__main__":
    main()
