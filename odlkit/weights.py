"""The shipped networks: a ``.safetensors`` file and a JSON card each; the card says how to build, check and retrain them."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from odlkit.networks import ConvUnit, RBFUnit, ResidualNet, UNet

FOLDER = Path(__file__).with_name("weights")
UNITS = {"conv": ConvUnit, "rbf": RBFUnit, "unet": UNet}
NETWORKS = {  # other kinds -> the class that the rest of the card's network are arguments of, imported when it is built
    "stages": "odlkit.models.padnet_gradient:Stages",
    "relaxed": "odlkit.models.podm:RelaxedNet",
    "cascade": "odlkit.models.gdc_joint:CascadeNet",
    "cells": "odlkit.models.gdc_rain:RainNet",
    "classifier": "odlkit.networks:Classifier",
    "flow": "odlkit.networks:FlowNet",
    "deconvolution": "odlkit.models.hodl_deblur:Deconvolution",
    "illumination": "odlkit.models.hodl_light:Illumination",
    "streaks": "odlkit.models.hodl_rain:Streaks",
    "features": "odlkit.networks:Features",
    "dgunet": "odlkit.models.dgunet:DGUNet",
    "sensing": "odlkit.models.dgunet:Sensing",
}


def cards() -> dict[str, dict]:
    """Name -> card: network, schedule, recipe, data, seed, steps, hardware, validation score, SHA-256."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def card(name: str) -> dict:
    """The card of one network.  Raises ``ValueError`` when there is none of that name."""
    path = FOLDER / f"{name}.json"
    if path.parent != FOLDER or not path.is_file():
        raise ValueError(f"weights: expected one of {', '.join(cards()) or '(none installed)'}, got {name!r}")
    return json.loads(path.read_text())


def load(name: str) -> nn.Module:
    """The network ``N_alpha`` of that name on the CPU, float32, in evaluation mode; called as ``network(v, alpha)``.

    ``card["network"]`` is ``{"kind": "conv" | "rbf" | "unet", "units": [config, ...], "bound": float | None}``, the
    arguments of a `ResidualNet`; where ``card["schedule"]`` has ``stages``, ``units`` is one such list for each iteration
    and the result is `odlkit.models.padnet_gradient.Stages`.  With ``{"kind": "relaxed", "units", "first", "last",
    "size"}`` the result is the `odlkit.models.podm.RelaxedNet` of these arguments, which `odlkit.models.podm.Relaxed`
    runs.  Raises ``ValueError`` for unknown names and for a file whose SHA-256 is not the card's.
    """
    from safetensors.torch import load as parse

    about = card(name)
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"weights: expected {path.name} beside its card, it is missing")
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != about["sha256"]:
        raise ValueError(f"weights: {path.name} does not have the SHA-256 that its card records")
    tensors = parse(blob)
    if about["network"]["kind"] == "relaxed":
        with torch.device("meta"):  # no time for random weights that are overwritten
            model = built(about)
        model.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    else:
        model = built(about)
        model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def built(about: dict) -> nn.Module:
    """The network of a card, with weights of its own."""
    config = {key: value for key, value in about["network"].items() if key != "kind"}
    kind = about["network"]["kind"]
    if "stages" in about["schedule"]:  # networks that change with the iteration
        kind = "stages"
    elif kind in UNITS:
        return ResidualNet([UNITS[kind](**unit) for unit in config["units"]], bound=config["bound"])
    elif "networks" in config:  # those of a comparison
        schedule: dict = {"schedule": {}}
        return nn.ModuleDict({k: built(schedule | {"network": v | {"kind": kind}}) for k, v in config["networks"].items()})
    module, name = NETWORKS[kind].split(":")
    return getattr(import_module(module), name)(**config)
