"""What the roles that learn run on: a group of ranks. Imports neither ray nor torch."""

from pydantic import Field, model_validator

from ...cluster.config import RoleResources


class LearnerResources(RoleResources):
    """The ranks that hold a model together, each an actor with so many CPUs and GPUs.

    Several share an update's completions, and each holds a shard of all weights (FSDP2) or, without `shard`, all of
    them; gradients do not depend on how many there are but for rounding. They talk through gloo, on GPUs through nccl,
    whose ports know no token: keep them on a network of your own.
    """

    ranks: int = Field(default=1, ge=1)
    shard: bool = True
    """Off, every rank holds the whole model and gradients are added up once an update: faster where it fits."""
    activation_checkpointing: bool = False
    """Keep a layer's input alone and compute the layer again in the backward: a third more work for less memory."""

    @model_validator(mode="after")
    def _a_rank_has_a_device(self) -> "LearnerResources":
        if self.gpus > 1:
            raise ValueError(f"gpus {self.gpus:g}: a rank computes on one GPU; take gpus: 1 and more ranks")
        if self.ranks > 1 and 0 < self.gpus < 1:
            raise ValueError(
                f"gpus {self.gpus:g} with ranks {self.ranks}: nccl takes no two ranks on one GPU; take gpus: 1, or one "
                "rank"
            )
        return self
