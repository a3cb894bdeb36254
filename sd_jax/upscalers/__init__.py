"""Picture -> larger picture, in one step."""
