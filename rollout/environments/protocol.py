"""What an environment is: the conversation so far in, what it says to it, a reward, and whether that was the end."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]
"""A message as chat templates take it: `role`, `content`, and `tool_calls` where the policy made some."""


class Turn(NamedTuple):
    """What an environment makes of the policy's last message."""

    observation: Sequence[Message] = ()
    """What the policy reads next: messages of the roles `tool` and `user`. It needs some to go on."""
    reward: float = 0.0
    """Rewards of an episode's turns add up, and come beside those of the recipe as `environment`."""
    done: bool = True


class Environment(Protocol):
    """A class of the user's file, made once a process without arguments.

    What it answers must depend on its arguments alone: an episode whose worker died is played again from the start,
    and several episodes take turns. `tools`, JSON schemas of functions, are shown to the policy by its chat template.
    """

    tools: Sequence[Message] = ()

    def step(self, messages: Sequence[Message], row: dict[str, Any]) -> Turn:
        """Answer the last of `messages`, which is the policy's; `row` is the data's. May also give a plain tuple."""
        ...
