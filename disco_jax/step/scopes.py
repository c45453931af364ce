"""Names of the parts of a step, in the names of its operations: for profiles and the planner."""

IMAGE_TOWER = "image_tower"
TEXT_TOWER = "text_tower"
LOSS = "loss"
GRADIENTS = "sum_gradients"  # over the devices
OPTIMIZER = "optimizer"

PARTS = (IMAGE_TOWER, TEXT_TOWER, LOSS, GRADIENTS, OPTIMIZER)
