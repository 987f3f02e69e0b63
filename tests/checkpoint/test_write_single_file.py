"""Original names at full size, on shapes alone: against the published layouts, and back through diffusers."""

from __future__ import annotations

import pytest
from diffusers.loaders import single_file_utils as convert
from original_keys import OPTIONAL, original_keys

from lcm_compile.checkpoint.checkpoint import Component
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.load import quiet_libraries
from lcm_compile.checkpoint.read_weights import as_diffusers
from lcm_compile.checkpoint.single_file import CLIP, CLIP_XL, TEXT_PREFIXES, UNET, VAE
from lcm_compile.checkpoint.write_single_file import original_weights

PUBLISHED = {"sd15": 1131, "sdxl": 2515}  # keys of v1-5-pruned-emaonly and of sd_xl_base_1.0


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_committed_keys_are_as_many_as_the_published_ones(family):
    keys = original_keys(family)
    assert len(keys) == len(set(keys))
    assert len(keys) + len(OPTIONAL[family]) == PUBLISHED[family]


def diffusers_own(name, module, weights, prefix):
    """diffusers' conversion of a file's weights. Its names of a text encoder begin with `text_model.`."""
    if name == "unet":
        return convert.convert_ldm_unet_checkpoint(weights, module.config)
    if name == "vae":
        return convert.convert_ldm_vae_checkpoint(weights, module.config)
    if prefix in (CLIP, CLIP_XL):
        found = convert.convert_ldm_clip_checkpoint(weights)
    else:
        found = convert.convert_open_clip_checkpoint(module, weights, prefix=prefix)
    nested = hasattr(module, "text_model")
    return {key if nested else key.removeprefix("text_model."): weight for key, weight in found.items()}


@pytest.mark.parametrize("family", [family.name for family in FAMILIES.values() if family.models])
def test_every_key_is_the_original_layouts_and_comes_back(family):
    models = FAMILIES[family].models
    written = {}
    with quiet_libraries():
        for name, config in models.items():
            module = empty_module(Component(name, config))
            own = dict(original_weights(name, config, "text_encoder_2" in models, module))
            assert not written.keys() & own.keys()
            written |= own
            prefix = next(p for p in (UNET, VAE, *TEXT_PREFIXES) if all(key.startswith(p) for key in own))
            shapes = {key: weight.shape for key, weight in module.state_dict().items()}
            for back in (
                as_diffusers(Component(name, config, prefix=prefix), module, dict(own)),
                diffusers_own(name, module, own, prefix),
            ):
                assert {key: weight.shape for key, weight in back.items()} == shapes
                shapes.pop("time_embedding.cond_proj.weight", None)  # diffusers knows no name for it
    assert sorted(written) == sorted(original_keys(family))
