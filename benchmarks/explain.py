"""Where the time of a step goes: ``decoder.explain`` of the random model S, in every format of the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from measure import Setting
from ours import WEIGHTS, Engine
from random_models import bare

CONTEXT = 128


def run(setting: Setting) -> list[dict[str, Any]]:
    results = []
    for dtype in ("fp32",) if setting.quick else WEIGHTS:
        for batch in (1, 8) if setting.quick else (1, 8, 32):
            decoder = Engine(bare("S"), dtype, max_batch=batch, cache_tokens=batch * 2 * CONTEXT).decoder
            explained = decoder.explain(batch_size=batch, context=CONTEXT)
            print(f"\na step of S, {dtype}, batch {batch}, context {CONTEXT}\n{explained}")
            results.append({"dtype": dtype, "batch": batch, "step": dataclasses.asdict(explained)})
    return results
