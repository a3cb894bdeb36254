"""A whole job, from Recipe to pictures."""
