"""Any DETR that transformers has, behind the contract of `models`: optional, and never imported by the core."""
