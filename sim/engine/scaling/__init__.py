"""A fleet whose instances leave service and come back, and whose power is limited."""
