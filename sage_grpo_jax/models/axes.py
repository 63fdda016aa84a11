"""Where things lie on the device mesh: its axes, and the logical axes that models name.

The one table of both. `layers.constrain` lays activations out by it, `parallel.mesh` makes the mesh
and `parallel.sharding` divides parameters and batches.
"""

MESH = ("data", "fsdp", "context")
# A batch of samples is divided over these, the model width over the others: then the devices of one
# context group also share the parameters.
BATCH = ("data", "fsdp")
WIDTH = ("fsdp", "context")

# Logical axes -> mesh axes; what is not listed is replicated.
ACTIVATIONS = {
    "batch": BATCH,
    "replica": ("data",),
    "tokens": ("context",),
    "heads": ("context",),
    "embed": WIDTH,
}
# Of parameters, as `partition_names` of a model names them.
PARAMETERS = {"embed": WIDTH}
