"""A case ready to run: one pass over its batch, launched one by one or as a CUDA graph, and timed.

All models of a comparison go through the same code.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

from visionmamba.bench.cases import (
    NUM_REFERENCE_IMAGES,
    Case,
    ModelName,
    OutOfMemory,
    is_vim,
    telling_out_of_memory,
)

if TYPE_CHECKING:
    import torch

Outputs: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
Launch = Literal["eager", "graph"]
"""eager: every kernel is launched by Python; graph: the whole pass is one CUDA graph."""
Key = TypeVar("Key")
Output = TypeVar("Output")

TURN_SECONDS = 0.05
MOST_PASSES = 1000
_FEWEST_TURNS, _ENOUGH_SECONDS = 3, 1.5
_AUXILIARY_WEIGHT = 0.4  # of UperNet's second head, as published
_NUM_OBJECTS = 8  # of each picture that a detector trains on
_OBJECT_SIDES = (1 / 16, 1 / 2)  # of the side of the picture


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Seconds of one pass: the median of the turns, the fastest and the slowest."""

    median: float
    low: float
    high: float


class Pass:
    """A case with its model and input in memory.

    Inference goes through visionmamba.optimize for every model, so that all of them are recorded,
    sliced and copied on the same terms; a training step is recorded here. Detectors, whose passes
    hang on what they find, run as they are, under autocast in bfloat16.

    Raises:
        RuntimeError, MemoryError: they do not fit; cases.telling_out_of_memory() says which.
    """

    def __init__(self, case: Case) -> None:

        from visionmamba.models.optimize import optimize

        self.case = case
        self.launch: Launch = "eager"
        """How `run` launches its kernels, once `prepare` has run."""
        self._images = case.build_images()
        self._model = case.build_model()
        self._objects = _draw_objects(case) if case.detector and case.mode == "train" else []
        self._run: Callable[[], Outputs] = self._train
        if case.detector is not None:
            self._run = self._learn_objects if case.mode == "train" else self._find_objects
        elif case.mode == "infer":
            self._model = optimize(self._model, dtype=case.dtype, cuda_graphs=case.cuda_graphs)
            self._run = self._infer

    @property
    def num_bytes(self) -> int:
        """Bytes of weights and input."""
        held = [*self._model.parameters(), *self._model.buffers(), self._images]
        held += [tensor for target in self._objects for tensor in target.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def prepare(self) -> None:
        """Run once and, on a GPU, record the pass as a CUDA graph where wanted and possible."""
        self._run()
        if not self.case.is_on_gpu or not self.case.cuda_graphs:
            return
        if self.case.mode == "train":
            try:
                self._run = capture(self._train)
            except RuntimeError:
                return
        self.launch = "graph"

    def run(self) -> "Outputs":
        """Launch one pass and return its logits, feature maps or boxes, without waiting."""
        return self._run()

    def named_gradients(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield the gradients that the last training step left, by the parameters' names."""
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad

    def _infer(self) -> "Outputs":
        outputs: Outputs = self._model(self._images)
        return outputs

    def _train(self) -> "Outputs":
        import torch

        device = self._images.device
        is_segmenter = self.case.segmenter is not None
        shape = (len(self._images), *(self._images.shape[2:] if is_segmenter else ()))
        targets = torch.zeros(shape, dtype=torch.long, device=device)
        self._model.zero_grad(set_to_none=True)
        is_half = self.case.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            outputs = self._model(self._images)
            logits, auxiliary = outputs if is_segmenter else (outputs, None)
            loss = torch.nn.functional.cross_entropy(logits, targets)
            if auxiliary is not None:
                extra = torch.nn.functional.cross_entropy(auxiliary, targets)
                loss = loss + _AUXILIARY_WEIGHT * extra
        torch.autograd.backward(loss)
        detached: torch.Tensor = logits.detach()
        return detached

    def _find_objects(self) -> "Outputs":
        import torch

        is_half = self.case.precision == "bfloat16"
        device = self._images.device.type
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=is_half):
            found = self._model(list(self._images))
        return tuple(one["boxes"] for one in found)

    def _learn_objects(self) -> "Outputs":
        import torch

        self._model.zero_grad(set_to_none=True)
        is_half = self.case.precision == "bfloat16"
        with torch.autocast(self._images.device.type, torch.bfloat16, enabled=is_half):
            losses = self._model(list(self._images), self._objects)
        loss = torch.stack(list(losses.values())).sum()
        torch.autograd.backward(loss)
        return loss.detach()


def _draw_objects(case: Case) -> "list[dict[str, torch.Tensor]]":
    """Return for each picture the boxes, labels and masks of filled rectangles."""
    import torch

    generator = torch.Generator().manual_seed(0)
    objects = []
    for _ in range(case.batch):
        low, high = _OBJECT_SIDES
        sides = low + (high - low) * torch.rand(_NUM_OBJECTS, 2, generator=generator)
        corners = (1 - sides) * torch.rand(_NUM_OBJECTS, 2, generator=generator)
        boxes = (torch.cat([corners, corners + sides], dim=1) * case.resolution).round()
        masks = torch.zeros((_NUM_OBJECTS, case.resolution, case.resolution), dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, case.num_classes + 1, (_NUM_OBJECTS,), generator=generator)
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        objects.append({name: tensor.to(case.device) for name, tensor in target.items()})
    return objects


def capture(step: Callable[[], Output]) -> Callable[[], Output]:
    """Return the replay of a step as a CUDA graph; it returns the step's output, made anew.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    import torch

    torch.cuda.empty_cache()  # what one stream freed, another cannot take
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a capture takes its memory anew
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Output:
        graph.replay()
        return output

    replay()
    return replay


@functools.cache
def _side_stream(device: int) -> "torch.cuda.Stream":
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def reference_output(case: Case) -> "Outputs":
    """Return the output for the first images of the batch with everything in float32.

    That of the plain Vim or DeiT which the case's model is a variant of. The batch norms of UperNet
    in training see the whole batch.
    """
    import torch

    images = case.build_images().float()  # rounded as the case's own
    name: ModelName = "vim" if is_vim(case.model) else "deit"
    plain = replace(case, model=name, precision="float32")
    needs_batch = case.mode == "train" and case.segmenter == "upernet"
    if not needs_batch:
        images, plain = images[:NUM_REFERENCE_IMAGES], replace(plain, mode="infer")
    model = plain.build_model()
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        outputs: Outputs = model(images)
    return outputs[0] if needs_batch else outputs


def relative_error(actual: "Outputs", expected: "Outputs") -> float:
    """Return the relative root-mean-square difference over the images that `expected` has."""
    wanted = _in_one_row(expected, NUM_REFERENCE_IMAGES)
    difference = _in_one_row(actual, NUM_REFERENCE_IMAGES) - wanted
    return float(difference.norm() / wanted.norm())


def seconds_in_turns(
    passes: "Mapping[Key, Callable[[], object]]", *, repeats: int, warmup: int, is_on_gpu: bool
) -> dict[Key, Spread]:
    """Return the seconds of each pass; all take turns, so that a busy moment hits all.

    A turn is as many passes as fill 50 ms, timed as a whole: by events on a GPU, by the clock
    elsewhere. A pass that runs out of memory is left out of the answer. On a GPU, where turns
    hardly differ, one that has run for 1.5 s is left alone after 3 turns.

    Args:
        passes: what is run, by any key.
        repeats: turns that count.
        warmup: turns before, at least 1; they tell how many passes fill a turn.
        is_on_gpu: whether the passes run on a CUDA device.
    """
    turn = gpu_seconds if is_on_gpu else cpu_seconds
    numbers: dict[Key, int] = {}
    seconds: dict[Key, list[float]] = {key: [] for key in passes}
    for round_number in range(-warmup, repeats):
        for key in list(seconds):
            spent = sum(seconds[key]) * numbers.get(key, 1)
            if is_on_gpu and len(seconds[key]) >= _FEWEST_TURNS and spent > _ENOUGH_SECONDS:
                continue
            try:
                with telling_out_of_memory():
                    seconds_of_one = turn(passes[key], numbers.get(key, 1))
            except OutOfMemory:
                del seconds[key]
                continue
            if round_number < 0:
                numbers[key] = max(1, min(MOST_PASSES, round(TURN_SECONDS / seconds_of_one)))
            else:
                seconds[key].append(seconds_of_one)
    return {
        key: Spread(median=statistics.median(values), low=min(values), high=max(values))
        for key, values in seconds.items()
    }


def cpu_seconds(run: "Callable[[], object]", number: int) -> float:
    """Return the mean seconds of so many calls by the clock."""
    begin = time.perf_counter()
    for _ in range(number):
        run()
    return (time.perf_counter() - begin) / number


def gpu_seconds(run: "Callable[[], object]", number: int) -> float:
    """Return the mean seconds of so many calls on the current GPU by its events."""
    import torch

    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(number):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / number


def _in_one_row(outputs: "Outputs", num_images: int) -> "torch.Tensor":
    """Return all numbers of the first images, logits or several maps, as one float32 vector."""
    import torch

    tensors = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return torch.cat([one[:num_images].float().flatten() for one in tensors])
