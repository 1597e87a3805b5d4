"""All checks by the kind of oracle that they replay: our functions on its inputs, compared with all of its outputs.

Every size comes from the oracle itself.
"""

from tests.parity import (
    checks_adamixer,
    checks_conditional,
    checks_criterion,
    checks_deformable,
    checks_detrdistill,
    checks_maps,
    checks_queries,
    checks_regions,
)

CHECKS = (
    checks_criterion.CHECKS
    | checks_deformable.CHECKS
    | checks_conditional.CHECKS
    | checks_adamixer.CHECKS
    | checks_detrdistill.CHECKS
    | checks_maps.CHECKS
    | checks_queries.CHECKS
    | checks_regions.CHECKS
)
