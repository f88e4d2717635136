"""How arrays lie on devices: meshes, placement, hints to the partitioner."""
