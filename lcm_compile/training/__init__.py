"""Training a LoRA or a whole UNet on a base: `distill` for four-step drawing, `train-lora` for a style.

Both are `loop.py` over a loss of their own: `distill.py` over `consistency.py`, and `dreambooth.py`.
"""
