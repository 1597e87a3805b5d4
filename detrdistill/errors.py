"""The ways a run is refused or stopped; all carry a message written for the person who started it."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message names the thing, the value, and the remedy, on one line."""


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity appeared in training. The message names the loss part and, in the trainer, step and images."""


class StoppedError(Exception):
    """SIGTERM asked training to stop. It has saved its last step, and running it again continues from there, bit for bit on the CPU."""
