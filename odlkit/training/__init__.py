"""Fitting: greedy, one unit at a time, and joint, through the iteration."""

# Name of the weights -> where the function ``(out, resume)`` that makes them is; imported when asked for.
RECIPES = {
    "padnet-image": "odlkit.training.padnet:joint",
    "padnet-gradient": "odlkit.training.padnet_gradient:gradient",
    "podm-denoiser": "odlkit.training.podm:denoiser",
    "rpodm-deblur": "odlkit.training.podm:deblur",
    "rpodm-sr": "odlkit.training.podm:super_resolution",
    "padnet-haze": "odlkit.training.haze:joint",
    "gdc-generator": "odlkit.training.gdc:generator_network",
    "gdc-classifier": "odlkit.training.gdc:classifier_network",
    "gdc-deblur-gm": "odlkit.training.gdc:deblur_gm",
    "gdc-deblur-gd": "odlkit.training.gdc:deblur_gd",
    "gdc-deblur-gc": "odlkit.training.gdc:deblur_gc",
    "gdc-deblur-gdc": "odlkit.training.gdc:deblur_gdc",
    "gdc-inpaint": "odlkit.training.gdc:inpaint",
    "gdc-search": "odlkit.training.search:compare",
    "gdc-derain": "odlkit.training.search:derain",
    "gdc-flow": "odlkit.training.flow:network",
    **{f"dgunet-cs-{n}": f"odlkit.training.dgunet:sensing_{n}" for n in (10, 25, 1, 4, 50)},
    **{f"dgunet-cs-{n}-paper": f"odlkit.training.dgunet:sensing_{n}_paper" for n in (10, 25)},
    "dgunet-denoise": "odlkit.training.camera:denoise",
    "dgunet-deblur": "odlkit.training.restore:motion",
    "dgunet-known": "odlkit.training.restore:known",
    "dgunet-derain": "odlkit.training.rain:derain",
    "dgunet-derain-paper": "odlkit.training.paper:derain",
    "dgunet-deblur-paper": "odlkit.training.paper:deblur",
    "dgunet-denoise-paper": "odlkit.training.paper:denoise",
    "hodl-denoiser": "odlkit.training.hodl:denoiser",
    "hodl-fewshot": "odlkit.training.fewshot:omniglot_features",
    "hodl-fewshot-mini": "odlkit.training.fewshot:mini_features",
    "first-order-fewshot": "odlkit.training.fewshot:first_order",
    "hodl-deblur": "odlkit.training.hodl:deblur",
    "hodl-deblur-nonexpansive": "odlkit.training.hodl:deblur_nonexpansive",
    "hodl-rain": "odlkit.training.hodl_rain:bounded",
    "hodl-rain-free": "odlkit.training.hodl_rain:free",
    "hodl-rain-numbers": "odlkit.training.hodl_rain:numbers",
    "hodl-light": "odlkit.training.light:light",
}


def recipe(name: str):
    """The training function of that name.  Raises ``ValueError`` when there is none."""
    from importlib import import_module

    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    module, function = RECIPES[name].split(":")
    return getattr(import_module(module), function)
