"""`gen-worker doctor`: what is wrong with a host before, or while, a worker runs on it."""
