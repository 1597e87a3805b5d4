"""What detectors, settings and measures are called, once. No torch here."""

from detrdistill.recipes.families import FAMILIES

DEFORMABLE, CONDITIONAL, ADAMIXER = "deformable_detr", "conditional_detr", "adamixer"
DETECTORS = {DEFORMABLE: "Deformable DETR", CONDITIONAL: "Conditional DETR", ADAMIXER: "AdaMixer"}
NAMES = DETECTORS | {name: family.title for name, family in FAMILIES.items()}  # and those of transformers
TITLES = {
    "teacher": "Teacher", "student": "Student", "detrdistill": "DETRDistill", "fitnet": "FitNet", "fgd": "FGD", "mgd": "MGD", "fkd": "FKD",
    "fgfi": "FGFI", "pkd": "PKD", "cwd": "CWD", "kd_detr": "KD-DETR", "d3etr": "D3ETR",
}  # fmt: skip
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MEASURED, STORED, NOT_RUN, NO_OBJECTS = "measured", "stored", "not run", "n/a"
