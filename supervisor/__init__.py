"""The control process: holds the stream to the scheduler and routes runs; no torch, no tenant code."""
