"""Host memory that the link reaches, and staging memory on the device."""
