"""Commands on a trained detector."""

import sys
from pathlib import Path

import tyro

from detrdistill.errors import InputError


def evaluate(
    model: tyro.conf.Positional[str],
    /,
    data: Path,
    split: str = "val",
    out: Path = Path("evaluation"),
    outputs: tuple[str, ...] = (),
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    batch: int = 1,
    device: str = "auto",
    workers: int | None = None,
) -> None:
    """Measure any detector that the kit reads: the twelve COCO numbers, AP a class, and results.json in COCO's format.

    Images are prepared as the detector wants them. Classes are found by name; the detector may know more than the data has.

    Args:
        model: a checkpoint file, a Hugging Face folder, a run's folder or id, or a hub id.
        data: folder of COCO json and images.
        split: val, train or test.
        out: folder for results.json.
        outputs: names of the classes of the file's outputs, where it does not say them.
        set: what the file does not say, such as heads=8 or points=4, or resize.short=640, or part=student of a file that holds several
            models; may be repeated.
        batch: images at once; padding changes the numbers of some detectors a little.
        device: auto, cpu, cuda, or cuda:1 for the second GPU.
        workers: processes that load images; without, up to four beside a GPU, and none on the CPU.
    """
    from detrdistill.checkpoints.locate import locate
    from detrdistill.parameters import assigned
    from detrdistill.runs.evaluate import evaluate_model

    settings = assigned(set)
    how = {"device": device, "batch": batch, "workers": workers, "outputs": outputs, "settings": settings}
    found = evaluate_model(locate(model).path, data, split, **how)
    print(found.text())
    print(f"\n{found.write(out)}")


def predict(
    model: tyro.conf.Positional[str],
    images: tyro.conf.Positional[str],
    /,
    threshold: float = 0.5,
    out: Path = Path("predictions"),
    outputs: tuple[str, ...] = (),
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    batch: int = 1,
    device: str = "auto",
    draw: bool = True,
) -> None:
    """Detect on images: pictures with boxes, results.json and images.json in COCO's formats, and detections.csv.

    Images are prepared as for an evaluation, and turned upright as EXIF says. One that cannot be read is named and passed over.

    Args:
        model: a run's folder or id, a checkpoint file, a Hugging Face folder, a hub id, or an .onnx that the kit wrote.
        images: a folder, a pattern in quotes such as 'photos/*.jpg', or a file.
        threshold: the least score, from 0 to 1.
        out: folder for what is written.
        outputs: names of the classes of the file's outputs, where it does not say them.
        set: what the file does not say, as in evaluate; may be repeated.
        batch: images at once; padding changes the numbers of some detectors a little.
        device: auto, cpu, cuda, or cuda:1 for the second GPU.
        draw: write pictures with boxes.
    """
    from detrdistill.parameters import assigned
    from detrdistill.predict.images import check_options, find_images, require_writable

    settings = assigned(set)
    check_options(threshold, batch)
    find_images(images, out)
    require_writable(out)

    from detrdistill.predict.models import open_model
    from detrdistill.predict.predict import predict

    found = predict(open_model(model, device, outputs, settings), images, out, threshold=threshold, batch=batch, drawn=draw)
    for reason in found.passed_over:
        print(f"passed over: {reason}", file=sys.stderr)
    print(f"{found.text()}\n{out}")


def compare(
    models: tyro.conf.Positional[tuple[str, ...]],
    /,
    data: Path | None = None,
    split: str = "val",
    out: Path = Path("comparison"),
    names: tuple[str, ...] = (),
    threshold: float = 0.5,
    batch: int = 1,
    device: str = "auto",
) -> None:
    """Put detectors side by side: AP, AP a class, parameters, GFLOPs, milliseconds an image, peak memory, and where they differ most.

    The others are compared with the first. Costs of a run are kept beside its record, for the tables of its preset.

    Args:
        models: two or more: a run's folder or id, a checkpoint file, a Hugging Face folder, a hub id, or an .onnx that the kit wrote.
        data: folder of COCO json and images; without, the data of the first run among the models.
        split: val, train or test.
        out: folder for tables (csv, md) and pictures (png).
        names: what to call each model; "teacher", "student" and "detrdistill" have colours of their own.
        threshold: the least score of what counts as found, from 0 to 1; AP does not depend on it.
        batch: images at once when AP is measured; padding changes the numbers of some detectors a little.
        device: auto, cpu, cuda, or cuda:1 for the second GPU.
    """
    from detrdistill.predict.images import check_options, require_writable

    check_options(threshold, batch)
    require_writable(out)

    from detrdistill.compare.compare import compare_models, data_of, named_models
    from detrdistill.compare.write import markdown, write_comparison
    from detrdistill.recipes.parts import Folder

    opened = named_models(models, names, device)
    spec = Folder(path=data) if data is not None else data_of(opened)
    found = compare_models(opened, spec, split, threshold=threshold, batch=batch)
    written = write_comparison(found, out)
    print(markdown(found.table), markdown(found.repaired), *written, sep="\n")


def export(
    model: tyro.conf.Positional[str],
    folder: tyro.conf.Positional[Path],
    /,
    format: str = "hugging-face",
    post_processing: bool = False,
    data: Path | None = None,
    outputs: tuple[str, ...] = (),
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Write a detector for use without the kit: as a folder that transformers opens, or as ONNX with a script that needs no torch.

    Args:
        model: for hugging-face a run's folder, results/<preset>/runs/<id>; for onnx also a run's id, a checkpoint file, a Hugging Face
            folder, or a hub id.
        folder: where the new folder goes.
        format: hugging-face (AutoModelForObjectDetection, AutoImageProcessor), or onnx (model.onnx and predict.py; docs/export.md).
        post_processing: onnx: the graph itself chooses the best detections and gives boxes in pixels.
        data: onnx: folder of COCO json and images that the file is verified on; without, the run's own.
        outputs: onnx: names of the classes of the file's outputs, where it does not say them.
        set: onnx: what the file does not say, such as heads=8, as in evaluate; may be repeated.
    """
    if format not in ("hugging-face", "onnx"):
        raise InputError(f"format '{format}' is unknown; known: hugging-face, onnx")
    from detrdistill.export import write
    from detrdistill.parameters import assigned

    if format == "onnx":
        print(write.export_onnx(model, folder, post_processing=post_processing, data=data, outputs=outputs, settings=assigned(set)))
    elif post_processing or data is not None or outputs or set:
        raise InputError("format hugging-face takes no post-processing, data, outputs or set; leave them out, or say --format onnx")
    else:
        print(write.export_run(Path(model), folder))
