"""Small runs that can be repeated: the demo, and the published results with their controls."""
