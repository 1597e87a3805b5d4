"""Which runs make which table: the paper's (Tables 1 and 3 to 10), and three of our own. Pure functions of presets. No torch here.

Each function takes the presets of one or more detectors and the seeds of the students, and names the runs. A table that the paper has
for one detector is made with that detector where the presets have it, otherwise with the first they have.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from detrdistill.errors import InputError
from detrdistill.recipes.identity import all_runs, parents, run_id
from detrdistill.recipes.methods import DETRDistill
from detrdistill.recipes.presets import Preset
from detrdistill.recipes.recipe import CropRecipe, Recipe
from detrdistill.recipes.rows import GAP, Presets, Seeds, Table, best, half, row, switched_row, table
from detrdistill.recipes.words import ADAMIXER, CONDITIONAL, NAMES, TITLES

WEIGHTS = "weights"  # the table of what was tried to tune weights, which is made in `tuning`
# Rows of several tables: the paper's names for them.
IN_PAPER = TITLES | {"detrdistill": "Ours"}
STRATEGIES = {
    "grouped": "grouped (Fig. 5)", "first": "first stages", "last": "last stages", "uniform": "at even distances",
    "last_to_all": "last to all", "last_only": "last to last alone",
}  # fmt: skip


def main_results(presets: Presets, seeds: Seeds) -> Table:
    """Table 3 and Figure 1: teacher, student, rivals and distilled students with equally many stages."""
    rows = []
    for preset in presets:
        detector = NAMES[preset.student.detector]
        for setting in preset.settings:
            stated = "" if preset.student.family else f"{detector} / {IN_PAPER[setting]}"
            rows.append(row(preset, seeds, setting, setting, published=stated))
    return table("main_results", presets, "table3", "Main results", rows)


def prior_methods(presets: Presets, seeds: Seeds) -> Table:
    """Table 1: methods made for convolutional detectors, after a third, two thirds and the whole of the schedule."""
    preset, rows = best(presets, ADAMIXER), []
    for epochs, part, words in ((4, 1 / 3, "1/3"), (8, 2 / 3, "2/3"), (12, 1.0, "whole")):
        for setting in ("student", "fgd", "fkd", "mgd", "fgfi", "fitnet", "detrdistill"):
            paper = "Baseline w/o KD" if setting == "student" else IN_PAPER[setting]
            stated = "" if setting == "detrdistill" else f"AdaMixer / {paper}"
            found = row(
                preset,
                seeds,
                setting,
                f"{setting} at {words}",
                baseline=f"student at {words}",
                published=stated,
                variant=f"{words} schedule",
            )
            rows.append(replace(found, at=part, column=f"AP {epochs} epochs"))
    return table("prior_methods", [preset], "table1", "Prior methods", rows)


def encoder_decoder(presets: Presets, seeds: Seeds) -> Table:
    """Table 4: students with half of the encoder's layers, half of the decoder's, or both."""
    preset, rows = best(presets, CONDITIONAL), []
    encoder, decoder = preset.student.encoder_layers, preset.student.decoder_layers
    rows.append(row(preset, seeds, "teacher", "teacher", published="Conditional DETR / Teacher"))
    # Half of one layer is none, which is a question of ours: the paper's students have three.
    for enc, paper_enc in ((encoder, 6), (encoder // 2, 3)) if preset.student.detector != ADAMIXER else ((encoder, 6),):
        for dec, paper_dec in ((decoder, 6), (half(decoder), 3)):
            changes = {"decoder_layers": dec} | ({"encoder_layers": enc} if preset.student.detector != ADAMIXER else {})
            cut = replace(preset, student=preset.student.replace(**changes))
            plain = f"student {enc}/{dec}"
            for setting in ("student", "detrdistill"):
                paper = f"Conditional DETR {paper_enc} enc {paper_dec} dec / {IN_PAPER[setting]}" if enc or not encoder else ""
                layers = f"{enc} encoder, {dec} decoder layers"
                rows.append(row(cut, seeds, setting, f"{setting} {enc}/{dec}", baseline=plain, published=paper, variant=layers))
    return table("encoder_decoder", [preset], "table4", "Encoder and decoder depth", rows)


def stage_mapping(presets: Presets, seeds: Seeds) -> Table:
    """Table 5 and Figure 5: which teacher stages teach a student with half of them. The paper's values were not found."""
    preset = best(presets, CONDITIONAL)
    preset = replace(preset, student=preset.student.replace(decoder_layers=half(preset.student.decoder_layers)))
    rows = [row(preset, seeds, "teacher", "teacher", published=GAP)]
    rows += [row(preset, seeds, "student", "student", published=GAP, variant=f"{preset.student.decoder_layers} decoder layers")]
    rows += [switched_row(preset, seeds, name, STRATEGIES[name], {"stages": name}, GAP) for name in preset.mappings or STRATEGIES]
    return table("stage_mapping", [preset], "table5", "Mapping of decoder stages", rows)


def self_distillation(presets: Presets, seeds: Seeds) -> Table:
    """Table 6: the teacher has the student's own backbone, and trained as long as the preset's teacher.

    The paper's values were not found, but that gains lie between 1.3 and 2.3 AP.
    """
    rows = []
    for preset in presets:
        teacher = preset.teacher.replace(backbone=preset.student.backbone)
        same = replace(preset, teacher=teacher, floor=min(preset.floor, 0.0))
        rows += [row(same, seeds, setting, setting, published=GAP) for setting in ("teacher", "student", "detrdistill")]
    return table("self_distillation", presets, "table6", "Self-distillation", rows)


def components(presets: Presets, seeds: Seeds) -> Table:
    """Table 7: each loss alone, and together."""
    preset = best(presets, ADAMIXER)
    rows = [row(preset, seeds, "student", "student", published="AdaMixer / no KD")]
    parts = ("logits", "features", "assignment")
    sets = (("logits",), ("features",), ("assignment",), parts[:2], ("logits", "assignment"), parts[1:], parts)
    alone = {part: getattr(preset.tuned_method("detrdistill", row=part), part) for part in parts}  # weights that each was tuned to alone
    for kept in sets:
        name = " + ".join(kept)
        stated = GAP if kept in (("logits", "assignment"), parts[1:]) else f"AdaMixer / {name}"
        method = preset.method.replace(**{part: alone[part] if part in kept else 0.0 for part in parts})
        rows.append(switched_row(preset, seeds, name, name.capitalize(), method, stated, name if len(kept) == 1 else ""))
    return table("components", [preset], "table7", "Components", rows)


def logits(presets: Presets, seeds: Seeds) -> Table:
    """Table 8: positives, negatives, and stages of the logits distillation, each row with a weight of its own.

    The paper's values were not found.
    """
    preset = best(presets, ADAMIXER)
    alone = {"features": 0.0, "assignment": 0.0}
    variants = {
        ("positives", "last stage"): {"matching": "positives", "stages": "last_only"},
        ("positives", "stage by stage"): {"matching": "positives"},
        ("positives and negatives", "last stage"): {"stages": "last_only"},
        ("positives and negatives", "stage by stage"): {},
        ("each divided by its own pairs", ""): {"normaliser": "pairs"},
        ("joint matching (released code)", ""): {"matching": "joint", "normaliser": "pairs"},
    }
    rows = [row(preset, seeds, "student", "student", published=GAP)]
    for (what, stages), changes in variants.items():
        name, stated = f"{what}, {stages}" if stages else what, "" if "normaliser" in changes else GAP
        tuned_as = name if changes else "logits"
        rows.append(switched_row(preset, seeds, name, name.capitalize(), alone | changes, stated, tuned_as, stages))
    return table("logits", [preset], "table8", "Logits distillation", rows)


def feature_masks(presets: Presets, seeds: Seeds) -> Table:
    """Table 9: which mask the feature distillation uses, each row with a weight of its own. The paper's values were not found.

    Before tuning masks of at most 1 have the weight 1; dot products of queries and features are larger, and have the preset's.
    """
    preset = best(presets, ADAMIXER)
    alone = {"logits": 0.0, "assignment": 0.0}
    variants = {
        "all cells alike (FitNet)": {"mask": "ones", "features": 1.0},
        "ground-truth boxes": {"mask": "boxes", "features": 1.0},
        "query masks (Eq. 7)": {"mask": "query"},
        "query masks by quality (Eq. 9)": {},
        "the released form": {"mask": "released", "features": 1.0},
    }
    rows = [row(preset, seeds, "student", "student", published=GAP)]
    for name, changes in variants.items():
        stated = "" if changes.get("mask") == "released" else GAP
        title = name[0].upper() + name[1:]
        rows.append(switched_row(preset, seeds, name, title, alone | changes, stated, name if changes else "features"))
    return table("feature_masks", [preset], "table9", "Feature masks", rows)


def light_backbones(presets: Presets, seeds: Seeds) -> Table:
    """Table 10: students with lighter backbones."""
    rows = []
    for preset in presets:
        detector = NAMES[preset.student.detector]
        rows.append(row(preset, seeds, "teacher", "teacher", published=f"{detector} / Teacher / R101"))
        for backbone, paper in zip(preset.light, ("R18", "MobileNetV2"), strict=False):
            backbone = backbone.replace(dilation=preset.student.backbone.dilation)
            light = replace(preset, student=preset.student.replace(backbone=backbone))
            plain = f"student {backbone.title}"
            for setting in ("student", "detrdistill"):
                name, stated = f"{setting} {backbone.title}", f"{detector} / {IN_PAPER[setting]} / {paper}"
                rows.append(row(light, seeds, setting, name, baseline=plain, published=stated, variant=backbone.title))
    return table("light_backbones", presets, "table10", "Light backbones", rows)


def discrepancies(presets: Presets, seeds: Seeds) -> Table:
    """Paper against released code, switch by switch; not in the paper."""
    preset = presets[0]
    switches = {
        "joint matching": {"matching": "joint", "normaliser": "pairs"},
        "joint matching and contrastive head": {"matching": "joint", "normaliser": "pairs", "contrast": 0.2},
        "released mask": {"mask": "released", "features": 1.0},
        "features before the encoder": {"maps": "neck"},
        "no adapter": {"adapter": False},
        "teacher's queries matched anew": {"pairing": "student"},
        "student's reference points": {"references": "student"},
    }
    two_stage = preset.student.form == "two_stage"  # which has no layer that makes reference points, and the released code takes them
    if two_stage:
        del switches["student's reference points"]
    rows = [row(preset, seeds, setting, setting) for setting in ("teacher", "student")]
    rows.append(row(preset, seeds, "detrdistill", "detrdistill", "As in the paper"))
    rows += [switched_row(preset, seeds, name, name.capitalize(), changes) for name, changes in switches.items()]
    if not two_stage:
        rows.append(switched_row(preset, seeds, "released", "All as in the released code", DETRDistill(variant="released")))
    return table("discrepancies", [preset], "", "Paper and released code", rows)


def follow_ups(presets: Presets, seeds: Seeds) -> Table:
    """DETRDistill beside methods that came after it, or that its paper does not compare with; not in the paper."""
    settings = ("teacher", "student", "detrdistill", "kd_detr", "d3etr", "pkd", "cwd")
    rows = [row(preset, seeds, setting, setting) for preset in presets for setting in settings]
    return table("follow_ups", presets, "", "Follow-ups", rows)


def full_schedule(presets: Presets, seeds: Seeds) -> Table:
    """Students that train as long as their teacher, as all of the paper's do: whether they reach it. On COCO, runs of the main results.

    For the first detector alone, since each run takes as long as a teacher.
    """
    preset = presets[0]
    preset = replace(preset, student=preset.student.replace(schedule=preset.teacher.schedule))
    detector = NAMES[preset.student.detector]
    rows = [
        row(preset, seeds, setting, setting, published=f"{detector} / {IN_PAPER[setting]}")
        for setting in ("teacher", "student", "detrdistill")
    ]
    return table("full_schedule", [preset], "table3", "Students trained as long as the teacher", rows)


def where_to_look(presets: Presets, seeds: Seeds) -> Table:
    """Figure 4: maps of the teachers, whose weight lies inside objects or not. Claims compare them; they are no row with an AP."""
    maps = {"queries": "Query masks by quality (Eq. 9)", "alike": "query masks, all queries alike", "area": "the boxes' part of the image"}
    rows = [row(preset, seeds, "teacher", name, title) for preset in presets for name, title in maps.items()]
    return table("where_to_look", presets, "", "Where to look", rows)


TABLES: dict[str, Callable[[Presets, Seeds], Table]] = {
    make.__name__: make
    for make in (
        main_results, prior_methods, encoder_decoder, stage_mapping, self_distillation, components, logits, feature_masks,
        light_backbones, discrepancies, follow_ups, full_schedule,
    )
}  # fmt: skip
BESIDE = {"where_to_look": where_to_look}  # what is compared beside the tables, and has a notebook alone


# What each answers, for who reads its page.
QUESTIONS = {
    "main_results": "Does DETRDistill help a small student, and more than older methods do?",
    "prior_methods": "Do methods made for convolutional detectors help a DETR, early and late in training?",
    "encoder_decoder": "Does DETRDistill help students of fewer layers, and which layers matter more?",
    "stage_mapping": "Which decoder stages of the teacher should teach a student that has half as many?",
    "self_distillation": "Does it help to learn from a teacher with the student's own backbone?",
    "components": "What does each of the three losses add, alone and together?",
    "logits": "Is it worth teaching boxes without an object, and every stage?",
    "feature_masks": "Where on its map should the student follow the teacher?",
    "light_backbones": "Does DETRDistill help students with lighter backbones?",
    "discrepancies": "Paper and released code differ. Does it matter, switch by switch?",
    "follow_ups": "Is DETRDistill ahead of methods that its paper does not compare with?",
    "full_schedule": "Does DETRDistill help a student that trains as long as its teacher, and does that student pass the teacher?",
    WEIGHTS: "How much should each loss weigh, when every row may try equally often?",
}


def possible_tables(presets: Presets) -> tuple[str, ...]:
    """Names of the tables that these presets can make: a published detector has one backbone, one depth, and no schedule here."""
    barred = {name for name in TABLES if not able(name, presets)}
    if any(preset.teacher.published for preset in presets):
        barred |= {"self_distillation", "full_schedule"}
    if any(preset.student.start for preset in presets):
        barred |= {"self_distillation", "encoder_decoder", "stage_mapping", "light_backbones"}
    return tuple(name for name in TABLES if name not in barred)


def make_table(name: str, presets: Presets, seeds: Seeds) -> Table:
    """The table called `name`.

    Raises:
        InputError: there is none, or no seeds; or it needs another teacher or student than a published detector.
    """
    if name not in TABLES | BESIDE:
        raise InputError(f"table '{name}' is unknown; known: {', '.join(TABLES)}, {WEIGHTS}")
    if not (some := able(name, presets)):
        titles = ", ".join(NAMES[preset.student.detector] for preset in presets)
        raise InputError(f"table '{name}' is not made for {titles}; their tables: {', '.join(possible_tables(presets))}")
    if name not in (*possible_tables(presets), *BESIDE):
        raise InputError(f"table '{name}' trains other teachers or students than the published detector; leave it out")
    if not seeds:
        raise InputError("no seeds given; name at least one, such as 0")
    make, some = (TABLES | BESIDE)[name], [preset for preset in some if name not in preset.left_out] or some
    made, before = make(some, seeds), make([replace(preset, tuned={}) for preset in some], seeds)
    if made.recipes() == before.recipes():
        return made
    return replace(made, rows=tuple(replace(row, untuned=same.recipes) for row, same in zip(made.rows, before.rows, strict=True)))


def able(name: str, presets: Presets) -> list[Preset]:
    """The presets that can make a table. What is left out for a family of transformers changes parts that it does not have."""
    return [preset for preset in presets if not (preset.student.family and name in preset.left_out)]


def all_compared(presets: Presets, seeds: Seeds) -> list[Table]:
    """All that claims are about: the tables, and what is compared beside them."""
    return [make_table(name, presets, seeds) for name in (*possible_tables(presets), *BESIDE) if able(name, presets)]


def only_parents(tables: Iterable[Table]) -> set[str]:
    """Names of the runs that others of these tables learn or start from, and that are no row to be measured but a teacher's.

    These may be taken from the committed reference (`runs.reference`): give all tables of the presets, so that the answer is one.
    """
    tables = list(tables)
    rows = [row for table in tables for row in table.rows]
    measured = {run_id(recipe) for row in rows if row.family != "teacher" for recipe in row.recipes.values()}
    runs = all_runs(recipe for table in tables for recipe in table.recipes())
    return {run_id(parent) for run in runs.values() for parent in parents(run).values()} - measured


def named_runs(names: Iterable[str], presets: Presets, seeds: Seeds) -> dict[str, Recipe | CropRecipe]:
    """All runs of the tables by id, those that others depend on included.

    Raises:
        InputError: an unknown table, or no seeds.
    """
    return all_runs(recipe for name in names for recipe in make_table(name, presets, seeds).recipes())


def usual_tables(presets: Presets) -> tuple[str, ...]:
    """What the batch makes of a preset if no table is named."""
    return ("main_results",) if presets[0].name in ("quick", "bccd") else possible_tables(presets)
