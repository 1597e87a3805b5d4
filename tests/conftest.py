"""Shapes and types of the functions on tensors are checked against their annotations while the tests run."""

from jaxtyping import install_import_hook

install_import_hook(
    [
        "detrdistill.boxes",
        "detrdistill.criterion",
        "detrdistill.distill",
        "detrdistill.matching",
        "detrdistill.models",
        "detrdistill.training.crops",
        "detrdistill.training.evaluation",
        "detrdistill.training.trainer",
    ],
    "beartype.beartype",
)
