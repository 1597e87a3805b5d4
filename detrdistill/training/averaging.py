"""A moving average of weights, which is less noisy than the weights of any one step."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average(AveragedModel):
    """Exponential moving average of a module's parameters and buffers, as torch computes it; `update_parameters` after every step.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's `ExponentialMovingAverage` with `num_updates`: the
    average soon forgets what the run started from, however long its memory is. Whole numbers are copied.

    Attributes:
        module: the copy that has the averages.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, multi_avg_fn=self._average, use_buffers=True)
        self.decay = decay

    def _average(self, averages: list[Tensor], values: list[Tensor], count: Tensor) -> None:
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        steps = int(self.n_averaged)  # on the CPU, unlike `count`, for which a GPU would be waited for
        get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))(averages, values, count)
