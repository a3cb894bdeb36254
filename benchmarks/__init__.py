"""Side-by-side measurements against diffusers with torch, each one command; RESULTS.md keeps what they gave."""
