"""Configs of the published models. The rows of `families.py` are made from them.

Each holds the settings in which the published checkpoint differs from the library's defaults.
"""

UNET_SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
UNET_XL = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

UNET_SSD_1B = {
    **UNET_XL,
    "mid_block_type": "UNetMidBlock2D",  # one residual block, no attention
    "transformer_layers_per_block": [0, [2, 2], [4, 4]],  # the first block has no attention
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
UNET_SD21 = {
    **UNET_SD15,
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
# The additional setting of a full LCM's UNet: it reads the guidance scale as an embedding of this width.
GUIDED = {"time_cond_proj_dim": 256}

VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}

# The tiny autoencoder of both VAEs: TAESD and TAESDXL differ only in their weights.
TAESD = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [64] * 4,
    "decoder_block_out_channels": [64] * 4,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_channels": 4,
    "scaling_factor": 1.0,
}

# OpenAI's CLIP ViT-L/14, and OpenCLIP's ViT-bigG/14 and ViT-H/14.
# The hub's files have eos_token_id 2: with it, transformers takes the largest id for the end of the text.
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
CLIP_BIGG = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
# SD2 reads the second to last of 24 layers: its checkpoints leave the last one out.
CLIP_H = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
PNDM = {"_class_name": "PNDMScheduler", **BETAS, "set_alpha_to_one": False, "skip_prk_steps": True}
EULER = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "leading"}
DDIM_V = {
    "_class_name": "DDIMScheduler",
    **BETAS,
    "set_alpha_to_one": False,
    "prediction_type": "v_prediction",
}

LCM = {"_class_name": "LCMScheduler", **BETAS}

# The models of SDXL and SSD-1B next to their UNet.
XL = {"vae": VAE_XL, "text_encoder": CLIP_L, "text_encoder_2": CLIP_BIGG}
