"""The process that runs tenant code: one per GPU, and replaced when it dies."""
