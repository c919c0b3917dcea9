"""Moving blocks: plans, routes that carry them out, and tickets for what is under way."""
