"""From a user's files to batches: sources, tasks, layouts, packing and the pipelines over them."""
