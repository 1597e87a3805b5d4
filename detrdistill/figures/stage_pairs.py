"""Which teacher stage teaches which student stage, as the paper's Figure 5 draws it."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from detrdistill.distill.stages import StagePairs
from detrdistill.figures import style


def stage_pairs(strategies: Mapping[str, StagePairs], student: int, teacher: int) -> Figure:
    """A panel a strategy: the teacher's stages above, the student's below, an arrow a pair, thick by its weight.

    Args:
        strategies: by title, as `pair_stages` gives them.
        student, teacher: numbers of stages.
    """
    with style.paper():
        columns = min(2 if style.narrow() else 3, len(strategies))
        rows = -(-len(strategies) // columns)
        figure = style.Picture(figsize=(style.width(), (0.2 + 1.35 * rows) * style.scale()))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        widest = max(student, teacher)

        def centre(stage, stages):
            return (stage + 0.5) * widest / stages

        for axes, (title, pairs) in zip(panels, strategies.items(), strict=False):
            axes.set_title(title, loc="left")
            axes.set(xlim=(-0.1 * widest, 1.02 * widest), ylim=(-0.35, 1.35))
            axes.axis("off")
            for own, other, weight in zip(pairs.student, pairs.teacher, pairs.weight, strict=True):
                ends = (centre(other, teacher), 0.84), (centre(own, student), 0.16)
                axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=7, linewidth=0.6 + weight, color=style.FAINT))
            for stages, y, setting in ((teacher, 1, "teacher"), (student, 0, "student")):
                for stage in range(stages):
                    box = {"boxstyle": "round,pad=0.25", "facecolor": style.COLOURS[setting], "edgecolor": "none"}
                    axes.text(
                        centre(stage, stages),
                        y,
                        str(stage + 1),
                        color="white",
                        fontsize=style.points(7),
                        ha="center",
                        va="center",
                        bbox=box,
                    )
                axes.text(-0.08 * widest, y, setting[0].upper(), fontsize=style.points(7), ha="left", va="center", color=style.FAINT)
        for axes in panels[len(strategies) :]:
            axes.axis("off")
        style.note(figure, "T: the teacher's stages. S: the student's. Thin arrows share a student stage.")
    return figure
