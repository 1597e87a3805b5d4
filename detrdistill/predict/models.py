"""Whatever detects: a detector of torch, or an exported .onnx, behind one method.

Both see images as `data.transforms` prepares them for an evaluation, and both are read by `training.evaluation.detections`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from detrdistill.checkpoints.locate import ids_of_run, locate
from detrdistill.checkpoints.names import ids_of_outputs
from detrdistill.checkpoints.pretrained import load_pretrained
from detrdistill.data.coco import Batch, collate
from detrdistill.data.transforms import ImageTransform, build_transform
from detrdistill.errors import InputError, NonFiniteError
from detrdistill.files import nearby
from detrdistill.models.weights import few
from detrdistill.recipes.parts import DetectorWeights, Resize
from detrdistill.runs.evaluate import SETTINGS
from detrdistill.training.evaluation import detections
from detrdistill.training.fabric import make_fabric


class Model(ABC):
    """A detector and what it needs to be used.

    Attributes:
        path: the run's folder, checkpoint or .onnx.
        names: the class of each output; None where an output stands for none.
        ids: the category id of each output: of a run as in its data, else COCO's, or counted; None where an output stands for none.
        transform: how it wants its images.
        runtime: whose code computes.
        top: how many pairs of query and class it reports an image.
        parameters: how many; None where the file does not say.
        weight_bytes: what its weights take.
    """

    path: Path
    title: str
    names: tuple[str | None, ...]
    ids: tuple[int | None, ...]
    transform: ImageTransform
    top: int
    runtime: str
    parameters: int | None
    weight_bytes: int

    @abstractmethod
    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the last stage says, on the host.

        Returns:
            logits [B Q C], and boxes [B Q 4] (cxcywh, relative to each image without padding); or of a file that has post-processing
            inside: scores [B K], labels [B K], and boxes [B K 4] (xyxy in pixels of the image's file), best first.
        """

    def check_sides(self) -> None:  # noqa: B027
        """Raise InputError unless images of any shape become ones that the detector takes; an .onnx does so by itself."""

    def detect(self, batch: Batch, classes: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
        """What is seen on each image, best first: `scores`, `labels` (output numbers) and `boxes` (xyxy in pixels of the file).

        Args:
            classes: outputs that count; those that have a name, if nothing is said.

        Raises:
            NonFiniteError: a prediction is NaN or infinite; names the images.
        """
        classes = torch.tensor([i for i, name in enumerate(self.names) if name is not None] if classes is None else list(classes))
        first, *others = self.outputs(batch)
        finite = first.isfinite().flatten(1).all(1) & others[-1].isfinite().flatten(1).all(1)
        if broken := [str(id) for id, good in zip(batch.image_ids, finite.tolist(), strict=True) if not good]:
            raise NonFiniteError(f"{self.path}: predictions for image ids {few(broken)} are NaN or infinite; look at these images")
        if len(others) == 2:
            kept = torch.isin(others[0], classes)
            found = {"scores": first, "labels": others[0], "boxes": others[1]}
            return [{name: value[i, kept[i]] for name, value in found.items()} for i in range(len(batch))]
        found = detections(first[..., classes], *others, batch.original_sizes, self.top)
        return [one | {"labels": classes[one["labels"]]} for one in found]


class TorchModel(Model):
    """A detector in any format that `load_pretrained` reads."""

    runtime = "torch"

    def __init__(self, weights: DetectorWeights, device: str, outputs: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.device = make_fabric(device, "fp32").device
        detector, about = load_pretrained(weights.path, outputs=outputs or None, part=weights.part or None, **settings)
        if not any(about.names):
            raise InputError(f"{about.title} does not say its classes; name its {len(about.names)} outputs as 'outputs'")
        self.detector: nn.Module = detector.to(self.device).requires_grad_(False)
        self.path, self.title, self.names, self.top = weights.path, about.title, about.names, detector.top
        self.resize = about.settings.get("resize", Resize())
        self.transform = build_transform(self.resize, train=False)
        self.ids = ids_of_outputs(about.names, ids_of_run(weights.path))
        self.parameters = sum(one.numel() for one in detector.parameters())
        self.weight_bytes = sum(one.nbytes for one in (*detector.parameters(), *detector.buffers()))

    def check_sides(self) -> None:
        multiple, sides = getattr(self.detector, "sides", 1), (self.resize.short, self.resize.long)
        if multiple == 1 or (self.resize.stretch and not any(side % multiple for side in sides)):
            return
        short, long = (max(1, round(side / multiple)) * multiple for side in sides)
        raise InputError(
            f"{self.title}: takes images whose sides are multiples of {multiple}, which photographs of another shape must be stretched to: "
            f"give --set resize.stretch=true --set resize.short={short} --set resize.long={long}"
        )

    @torch.no_grad()
    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        memory = self.detector.encode(batch.pixels.to(self.device, memory_format=torch.channels_last), batch.padding.to(self.device))
        (output,) = self.detector.decode(memory, self.detector.queries(memory))
        return output.logits[-1].float().cpu(), output.boxes[-1].float().cpu()


class OnnxModel(Model):
    """A detector that `detrdistill export --format onnx` wrote. onnxruntime computes, on the CPU.

    With post-processing inside, pairs of classes that do not count take places among its `top` all the same.

    Args:
        threads: 0 for as many as onnxruntime likes.
    """

    runtime = "onnxruntime"

    def __init__(self, path: Path, device: str = "auto", threads: int = 0) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise InputError(f"model {path}: onnxruntime is not installed; install the extra: pip install 'detrdistill[onnx]'") from None
        if device.startswith("cuda"):
            raise InputError(f"device '{device}': an .onnx is run on the CPU here; use device 'cpu', or the detector it was exported from")
        make_fabric(device, "fp32")  # refuses a device that is none
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            about = self.session.get_modelmeta().custom_metadata_map
            classes, rule, mean, std = (json.loads(about[key]) for key in ("classes", "resize", "mean", "std"))
            self.names, self.ids = tuple(one["name"] for one in classes), tuple(int(one["id"]) for one in classes)
            self.top = int(about["top"])
        except Exception as error:  # onnxruntime's own have no common name
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"model {path}: not a detector that detrdistill exported ({type(error).__name__}: {reason})") from None
        self.path, self.title, self.inputs = path, f"{path} (ONNX)", [one.name for one in self.session.get_inputs()]
        sides = {"short": rule["height"], "long": rule["width"], "stretch": True} if "height" in rule else rule
        self.transform = build_transform(Resize.read(sides | {"mean": mean, "std": std}, where=str(path)), train=False)
        self.parameters = int(about["parameters"]) if "parameters" in about else None
        self.weight_bytes = path.stat().st_size

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        sizes = torch.stack([(~batch.padding).any(dim).sum(1) for dim in (2, 1)], dim=1)
        given = {"pixels": batch.pixels, "sizes": sizes, "original_sizes": torch.tensor(batch.original_sizes)}
        found = self.session.run(None, {name: given[name].numpy() for name in self.inputs})
        return tuple(torch.from_numpy(one) for one in found)


def open_model(
    model: str, device: str = "auto", outputs: Sequence[str] = (), settings: Mapping[str, Any] | None = None, threads: int = 0
) -> Model:
    """The detector that `model` names.

    Args:
        model: an .onnx, or what `checkpoints.locate` knows: a run's id or folder, a checkpoint, a Hugging Face folder, a hub id.
        threads: of onnxruntime; 0 for as many as it likes.
        outputs: names of the classes of the file's outputs, where it does not say them.
        settings: of `runs.evaluate.SETTINGS`: what neither the file nor its tensors say.

    Raises:
        InputError: there is no such model, or it is not usable.
    """
    settings = dict(settings or {})
    if strange := sorted(settings.keys() - {*SETTINGS}):
        raise InputError(f"setting '{strange[0]}' is none that a detector takes; known are {', '.join(SETTINGS)}")
    path = nearby(Path(model).expanduser())
    path = path / "model.onnx" if (path / "model.onnx").is_file() else path  # the folder of an export
    if path.suffix == ".onnx":
        if not path.is_file():
            raise InputError(f"model '{model}': no such file; correct the path")
        if outputs or settings:
            raise InputError(f"model '{model}': an .onnx says its classes and its images' size itself; leave out 'outputs' and 'set'")
        return OnnxModel(path, device, threads)
    weights = locate(model)
    return TorchModel(weights.replace(part=settings.pop("part", "")), device, outputs, settings)


def prepare(images: Sequence[Image.Image], ids: Sequence[int], transform: ImageTransform) -> Batch:
    """RGB images as a detector is evaluated on them, in one batch."""
    samples = []
    for id, image in zip(ids, images, strict=True):
        boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(image.height, image.width))
        target = {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.long)}
        pixels, target = transform(tv_tensors.Image(v2.functional.pil_to_tensor(image)), target)
        where = {"image_id": id, "original_size": (image.height, image.width)}
        samples.append((pixels.as_subclass(Tensor), {"labels": target["labels"], "boxes": torch.zeros(0, 4), **where}))
    return collate(samples)
