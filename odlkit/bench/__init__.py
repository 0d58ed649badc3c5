"""A paper's tables on the data at hand, each a function ``run(progress) -> record`` that carries its provenance.

`SUITES` adds the ``seconds`` that it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

PLACES = {
    "padnet-table-1": "odlkit.bench.padnet_table_1:run",
    "padnet-table-2": "odlkit.bench.padnet_deblur:table_2",
    "padnet-set3c": "odlkit.bench.padnet_deblur:set3c",
    "padnet-haze": "odlkit.bench.haze:run",
    "lowlight": "odlkit.bench.lowlight:run",
    "rpodm-set3c": "odlkit.bench.podm_deblur:set3c",
    "rpodm-table-2": "odlkit.bench.podm_deblur:table_2",
    "rpodm-real": "odlkit.bench.podm_deblur:real",
    "deblur-weights": "odlkit.bench.padnet_deblur:tune",
    "podm-table-1": "odlkit.bench.podm_sr:table_1",
    "podm-table-1-set14": "odlkit.bench.podm_sr:table_1_set14",
    "podm-figure-2": "odlkit.bench.podm_sr:figure_2",
    "podm-sr-weights": "odlkit.bench.podm_sr:tune",
    "gdc-deblur": "odlkit.bench.gdc:deblur",
    "gdc-inpaint": "odlkit.bench.gdc:interpolate",
    "gdc-smooth": "odlkit.bench.gdc:smoothing",
    "gdc-blind": "odlkit.bench.gdc_blind:run",
    "gdc-flow": "odlkit.bench.flow:run",
    "gdc-flow-settings": "odlkit.bench.flow:tune",
    "gdc-search": "odlkit.bench.gdc_search:run",
    "dgunet-ablation": "odlkit.bench.dgunet_ablation:run",
    "dgunet-cs": "odlkit.bench.dgunet_cs:run",
    "dgunet-derain": "odlkit.bench.dgunet_derain:run",
    "denoise-classical": "odlkit.bench.dgunet_denoise:classical",
    "dgunet-denoise": "odlkit.bench.dgunet_denoise:run",
    "hyper-cleaning": "odlkit.bench.hyper_cleaning:run",
    "hodl-lambda": "odlkit.bench.hodl_lambda:run",
    "hodl-sparse": "odlkit.bench.hodl_sparse:regularised",
    "hodl-constrained": "odlkit.bench.hodl_sparse:constrained",
    "fewshot-omniglot": "odlkit.bench.fewshot:omniglot",
    "fewshot-methods": "odlkit.bench.fewshot:methods",
    "fewshot-mini": "odlkit.bench.fewshot:mini",
    "hodl-deblur": "odlkit.bench.hodl_deblur:run",
    "hodl-rain": "odlkit.bench.hodl_rain:run",
    "gan-ring": "odlkit.bench.gan:run",
    "dgunet-known": "odlkit.bench.dgunet_deblur:known",
    "dgunet-deblur": "odlkit.bench.dgunet_deblur:motion",
}


def _later(place: str) -> Callable[..., dict[str, Any]]:
    def run(progress: bool = False) -> dict[str, Any]:
        from importlib import import_module

        module, function = place.split(":")
        clock = time.monotonic()
        record = getattr(import_module(module), function)(progress=progress)
        return record | {"seconds": round(time.monotonic() - clock)}

    return run


SUITES = {name: _later(place) for name, place in PLACES.items()}


def each(items: Iterable[Any], name: str, progress: bool, total: int | None = None) -> Iterable[Any]:
    """The items, behind a progress bar of that name."""
    from tqdm import tqdm

    return tqdm(items, desc=name, total=total, disable=not progress)


def provenance(suite: str, sets: Iterable[str], seeds: Iterable[int], weights: Iterable[str] = ()) -> dict[str, Any]:
    """What a recorded result must carry: command, commit, seeds, versions, hardware, and checksums of data and weights."""
    import torch

    from odlkit import data
    from odlkit.tasks.report import versions
    from odlkit.training.loop import commit, hardware
    from odlkit.weights import card

    return {
        "command": f"odlkit bench {suite} --json book/results/{suite}.json",
        "commit": commit(),
        "seeds": list(seeds),
        "versions": versions(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "data": {name: data.checksum(name) for name in sets},
        "weights": {name: card(name)["sha256"] for name in weights},
    }
