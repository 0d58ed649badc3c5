"""The shipped networks: a ``.safetensors`` file and a JSON card each; the card says how to build, check and retrain them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from odlkit.networks import Classifier, ConvUnit, FlowNet, RBFUnit, ResidualNet, UNet

FOLDER = Path(__file__).with_name("weights")
UNITS = {"conv": ConvUnit, "rbf": RBFUnit, "unet": UNet}


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
    network = about["network"]
    if "stages" in about["schedule"]:  # networks that change with the iteration
        from odlkit.models.padnet_gradient import Stages

        model: nn.Module = Stages(network["units"], network["bound"])
    elif network["kind"] == "relaxed":
        from odlkit.models.podm import RelaxedNet

        with torch.device("meta"):  # no time for random weights that are overwritten
            model = RelaxedNet(**{key: value for key, value in network.items() if key != "kind"})
        model.load_state_dict({key: value.float() for key, value in parse(blob).items()}, assign=True)
        return model.eval().requires_grad_(False)
    elif network["kind"] == "cascade":
        from odlkit.models.gdc_joint import CascadeNet

        model = CascadeNet(**{key: value for key, value in network.items() if key != "kind"})
    elif network["kind"] == "cells":
        from odlkit.models.gdc_rain import RainNet

        several = network.get("networks")  # those of a comparison
        config = {key: value for key, value in network.items() if key != "kind"}
        model = nn.ModuleDict({k: RainNet(**v) for k, v in several.items()}) if several else RainNet(**config)
    elif network["kind"] == "flow":
        model = FlowNet(**{key: value for key, value in network.items() if key != "kind"})
    elif network["kind"] == "deconvolution":
        from odlkit.models.hodl_deblur import Deconvolution

        model = Deconvolution(**{key: value for key, value in network.items() if key != "kind"})
    elif network["kind"] == "illumination":
        from odlkit.models.hodl_light import Illumination

        model = Illumination(**{key: value for key, value in network.items() if key != "kind"})
    elif network["kind"] == "streaks":
        from odlkit.models.hodl_rain import Streaks

        model = Streaks(**{key: value for key, value in network.items() if key != "kind"})
    elif network["kind"] == "features":
        from odlkit.training.fewshot import Features

        model = Features(network["width"], network["channels"])
    elif network["kind"] == "streaks":
        from odlkit.models.hodl_rain import Streaks

        model = Streaks(**{key: value for key, value in network.items() if key != "kind"})
    elif network["kind"] in ("dgunet", "sensing"):
        from odlkit.models.dgunet import DGUNet, Sensing, Setting

        config = {key: value for key, value in network.items() if key != "kind"}
        model = DGUNet(Setting(**config)) if network["kind"] == "dgunet" else Sensing(**config)
    elif network["kind"] == "classifier":
        model = Classifier(network["widths"])
    else:
        unit = UNITS[network["kind"]]
        model = ResidualNet([unit(**config) for config in network["units"]], bound=network["bound"])
    model.load_state_dict(parse(blob))
    return model.eval().requires_grad_(False)
