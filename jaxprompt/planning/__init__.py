"""What a run would need on devices that are not here: chips, topologies, compiled programs read."""
