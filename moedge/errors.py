"""Every error a user can meet: a message names the thing, its value and the remedy; no traceback is shown for them."""


class MoedgeError(Exception):
    """Base of all errors that are the input's or the machine's fault, not a bug."""


class ModelError(MoedgeError):
    """The model is of a kind that moedge cannot run: dense, quantised by others, or without a text path."""


class CheckpointError(MoedgeError):
    """A checkpoint's files are missing, damaged, changed while running, or disagree with each other."""


class MemoryLimitError(MoedgeError):
    """The memory limit is below what the work needs."""


class ContextError(MoedgeError):
    """More tokens than the reserved context holds."""


class DataError(MoedgeError):
    """A text, task or trace file is missing or malformed."""
