"""The fixtures of these tests: small models of diffusers."""

from small_reference import _one_torch_thread, make_reference, reference

__all__ = ["_one_torch_thread", "make_reference", "reference"]
