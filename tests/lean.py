"""Imported before all else by the tests' processes: leaves out an import that takes seconds in each, and that nothing here needs.

jsonschema, which nbformat imports, builds a grammar of internationalised addresses (RFC 3987); no schema of a notebook has such a field.
"""

import sys

sys.modules["rfc3987_syntax"] = None
