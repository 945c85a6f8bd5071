"""The pipe between the supervisor and an executor: messages, frames, shared memory.

Both ends import this package and nothing of each other.
"""
