"""Environments: what answers the policy between its turns, until an episode is over."""

from .protocol import Environment, Message, Turn

__all__ = ["Environment", "Message", "Turn"]
