"""Pretraining of the small moving-shapes model on 2 CPU cores; see docs/pretraining.md."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe of the shipped weights."""
    config = ConfigDict()
    config.seed = 0
    config.vae_model = vae_model()
    config.transformer = transformer()

    # The autoencoder, from nothing: first on cuts of 5 frames, which cost two thirds of whole
    # clips. Without the contrast weight no shape is painted for long: background is nine tenths of
    # a frame.
    config.vae = ConfigDict(
        {
            "steps": 4000,
            "short_steps": 3000,
            "short_batch_size": 8,
            "short_frames": 5,
            "noise_warmup_steps": 1000,
            "batch_size": 4,
            "optimizer": "muon",
            "learning_rate": 7e-4,
            "warmup_steps": 100,
            "weight_decay": 0.0,
            "beta2": 0.99,
            "gradient_clip": 1.0,
            "ema_decay": 0.998,
            "log_every": 50,
            "checkpoint_every": 200,
            "l1_weight": 0.5,
            "l2_weight": 1.0,
            "edge_weight": 1.0,
            "contrast_weight": 10.0,
            "kl_weight": 3e-5,
        }
    )

    # The same once more from its averaged weights, on whole clips: the change from the cuts leaves
    # their last frames worse than the others.
    config.polish = ConfigDict(
        {
            **config.vae.to_dict(),
            "steps": 1600,
            "short_steps": 0,
            "noise_warmup_steps": 0,
            "learning_rate": 5e-4,
        }
    )

    # The decoder alone, as sharp as it gets: the latents are settled from here on, so that the
    # transformer can be trained meanwhile. A little noise stands for what sampling gets wrong.
    config.decoder = ConfigDict(
        {**config.polish.to_dict(), "steps": 3000, "kl_weight": 0.0, "latent_noise": 0.02}
    )

    # Training captions only: what the transformer has not been shown is left to test it with
    config.latents = ConfigDict({"num_clips": 32768, "batch_size": 64})

    # Rectified flow; σ is the logistic of a standard normal, shifted as in sampling. One caption in
    # ten is dropped, so that there is an unconditional branch to guide with. The first latent frame
    # stands for one frame of the video alone and comes out worst, so it counts double.
    config.flow = ConfigDict(
        {
            "steps": 29000,
            "batch_size": 32,
            "learning_rate": 1.5e-3,
            "warmup_steps": 200,
            "weight_decay": 0.01,
            "beta2": 0.99,
            "gradient_clip": 1.0,
            "ema_decay": 0.999,
            "log_every": 50,
            "checkpoint_every": 500,
            "shift": 3.0,
            "sigma_mean": 0.0,
            "sigma_std": 1.0,
            "caption_drop": 0.1,
            "first_frame_weight": 2.0,
        }
    )

    # One pass learns what guidance makes of four (docs/pretraining.md).
    config.distill = ConfigDict(
        {
            **config.flow.to_dict(),
            "steps": 2500,
            "learning_rate": 8e-4,
            "warmup_steps": 100,
            "ema_decay": 0.995,
            "guidance": 2.0,
            "contrast": 1.0,
        }
    )

    # The decoder on latents as sampling makes them: noised, then denoised by the transformer
    config.sharpen = ConfigDict(
        {
            **config.decoder.to_dict(),
            "steps": 4000,
            "learning_rate": 5e-4,
            "latent_noise": 0.02,
            "max_sigma": 0.7,
            "denoising_steps": 3,
        }
    )

    config.report = ConfigDict(
        {
            "sampling_steps": (10, 40),
            "shift": 3.0,
            "num_samples": 64,
            "sheet_rows": 10,
            "sheet_frames": 6,
        }
    )

    return config


def vae_model() -> ConfigDict:
    """4x in time, 8x in space, 16 channels: a clip of 17x32x32 is 5x4x4 tokens."""
    return ConfigDict(
        {
            "latent_channels": 16,
            "block_out_channels": (8, 16, 32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 4,
        }
    )


def transformer() -> ConfigDict:
    """A HunyuanVideo-1.5 transformer of width 128, eight times its token, without ByT5."""
    return ConfigDict(
        {
            "in_channels": 33,
            "out_channels": 16,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "mlp_ratio": 3.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 32,
            "text_embed_2_dim": None,
            "image_embed_dim": None,
            "rope_axes_dim": (8, 12, 12),
        }
    )
