"""Which route serves which transfer on one kind of GPU: profiles, and how they are measured and kept."""
