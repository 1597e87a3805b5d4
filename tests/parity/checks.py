"""All checks by the kind of oracle that they replay."""

from tests.parity import checks_detectors, checks_detrdistill, checks_maps, checks_queries, checks_regions

CHECKS = checks_detectors.CHECKS | checks_detrdistill.CHECKS | checks_maps.CHECKS | checks_queries.CHECKS | checks_regions.CHECKS
