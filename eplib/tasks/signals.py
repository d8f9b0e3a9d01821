"""What a model of a task takes and gives: with it a run's model is built again where the data are not."""

from typing import Annotated

from pydantic import Field

from ..config import configuration
from ..families import Family

Count = Annotated[int, Field(ge=1)]


class Signal(Family):
    """What the batches of a task are like; stored with a run."""


@configuration
class Tokens(Signal):
    """Inputs and targets are token ids (B, T <= context) of a vocabulary of `vocab`; a target is the token after its input."""

    vocab: Count
    context: Count


@configuration
class Patches(Signal):
    """Inputs are images in patches (B, tokens, size), row by row, a pixel's `channels` side by side; targets class ids (B,)
    below `classes`."""

    tokens: Count
    size: Count
    classes: Count
    channels: Count = 1
