"""Original names at full size, on shapes alone: against the published layouts, and back through diffusers."""

from __future__ import annotations

import pytest
from original_keys import OPTIONAL, original_keys

from lcm_compile.checkpoint.checkpoint import Component
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.families import FAMILIES, lora_bases
from lcm_compile.checkpoint.load import quiet_libraries
from lcm_compile.checkpoint.read_single_file import as_diffusers
from lcm_compile.checkpoint.single_file import TEXT_PREFIXES, UNET, VAE
from lcm_compile.checkpoint.write_single_file import original_weights

PUBLISHED = {"sd15": 1131, "sdxl": 2515}  # keys of v1-5-pruned-emaonly and of sd_xl_base_1.0


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_committed_keys_are_as_many_as_the_published_ones(family):
    keys = original_keys(family)
    assert len(keys) == len(set(keys))
    assert len(keys) + len(OPTIONAL[family]) == PUBLISHED[family]


# Full LCMs have no original names.
@pytest.mark.parametrize("family", [family.name for family in lora_bases() if family.models])
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
            component = Component(name, config, prefix=prefix)
            back = as_diffusers(component, module, own)
            shapes = {key: weight.shape for key, weight in module.state_dict().items()}
            assert {key: weight.shape for key, weight in back.items()} == shapes
    assert sorted(written) == sorted(original_keys(family))
