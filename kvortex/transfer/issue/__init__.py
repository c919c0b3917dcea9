"""A whole plan on a GPU in compiled calls that hold no GIL: launches, copies, their order, and their pace beside a model."""
