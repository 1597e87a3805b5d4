"""Shapes and types in detectors and losses are checked against their annotations while the tests run."""

from jaxtyping import install_import_hook

CHECKED = ("boxes", "criterion", "distill", "matching", "models")

install_import_hook([f"detrdistill.{name}" for name in CHECKED], "beartype.beartype")
