"""Trains a LoRA or a complete UNet on a base: `distill` for four-step sampling, `train-lora` for a style.

Both run the loop in `loop.py`. `distill.py` gives it the loss of `consistency.py`; `dreambooth.py` has its
own.
"""
